"""The alive lock: a machine is alive if and only if its keeper holds `flock(alive)` (flock(2)).

True across pid namespaces and pid reuse. The lock belongs to the open file, so whoever inherits the descriptor holds
it too: it is close-on-exec, and children that are forked meanwhile close it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from trivisor.core.errors import Busy
from trivisor.core.paths import MachineDir

LOOK = 0.05
"""Seconds for which another process mostly holds the lock just to look at it."""
_LOOKS = 5.0
"""The most: one that looks may not get a processor for a while."""
_STRAY = 0.5
"""Seconds that a child which was forked as another start had the lock may take to close its copy."""

_guarded: set[int] = set()
"""Open alive files: a child that is forked meanwhile must not keep the lock, which goes with the open file."""
_hooked: list[bool] = []


def _close_guarded() -> None:
    for fd in _guarded:
        with contextlib.suppress(OSError):
            os.close(fd)
    _guarded.clear()


@contextlib.contextmanager
def open_alive(machine: MachineDir, flags: int) -> Iterator[int]:
    """Open the alive file while the block runs."""
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(after_in_child=_close_guarded)
    fd = os.open(machine.alive, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    _guarded.add(fd)
    try:
        yield fd
    finally:
        _guarded.discard(fd)
        os.close(fd)


def lock_alive(machine: MachineDir, fd: int) -> None:
    """Lock the alive file. Raises Busy if a keeper holds it."""
    began = time.monotonic()
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began > (_LOOKS if _shared(fd) else _STRAY):
                raise Busy(machine.root.name, "its keeper runs") from None
        time.sleep(LOOK / 10)  # flock(2) has no timeout, and `alive` holds the lock for a moment


def _shared(fd: int) -> bool:
    """Whether those who hold the lock only look, which is what a shared one is for; leaves it unlocked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def alive(machine: MachineDir) -> bool:
    """Say whether the machine's keeper runs: whether its lock is held."""
    try:
        with open_alive(machine, os.O_RDONLY) as fd:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
