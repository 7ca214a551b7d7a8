"""One operation at a time on a machine: a flock on a file of its folder, which names who holds it.

flock(2) and not a pid in a row, because the kernel lets go of it however its holder ends, and because it
means the same in every pid namespace. The lock belongs to the open file, which a fork shares: so it is
taken back with LOCK_UN, not only by closing, and a forked child closes its copies before it runs anything.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trivisor.core.errors import Busy, StorageError

SETTLE = "settle"
"""Holds a machine for the few milliseconds in which a record is put right."""
_SETTLE_WAIT = 10.0
_POLL = 0.01
_NAMELESS = 2.0
"""Seconds that a holder may take to say its name, or to let go once it has taken it back: it may not get a processor for a while."""

_held: set[int] = set()
_hooked = False


class FolderGone(StorageError):
    """The folder that holds the lock is not there, or is being removed."""


@contextmanager
def hold(path: Path, operation: str, machine: str, *, wait: float = 0.0, make: bool = True) -> Iterator[None]:
    """Hold the lock at `path` for `operation`, waiting at most `wait` seconds for another to end.

    A machine that is only being put right is waited for in any case. Without `make` there must be a file to lock: who
    removes a folder holds the lock of a file that goes with it, and another made in its place would lock nothing.
    Raises Busy naming the operation that holds it, FolderGone where there is no folder, or file.
    """
    _hook()
    fd = _open(path, machine, os.O_CREAT if make else 0)
    _held.add(fd)
    try:
        _acquire(fd, operation, machine, wait)
        os.ftruncate(fd, 0)
        # The name is for others to read in their error; a full disk must not stand in a machine's way.
        with suppress(OSError):
            os.pwrite(fd, f"{operation} {os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(fd, 0)
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        _held.discard(fd)
        os.close(fd)


def held(path: Path) -> bool:
    """Return whether some process holds the lock at `path` now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _open(path: Path, machine: str, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError as error:
        raise FolderGone(f"the folder {path.parent} is gone", machine=machine, hint="delete the machine") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}", machine=machine) from error


def _acquire(fd: int, operation: str, machine: str, wait: float) -> None:
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "an operation"
        # flock(2) has no timeout, hence the poll. A nameless holder has just taken the lock, or is letting go.
        patience = max(wait, _SETTLE_WAIT) if operation != SETTLE and holder.startswith(SETTLE) else wait
        if holder == "an operation" or _died(holder):
            patience = max(patience, _NAMELESS)
        if time.monotonic() - began >= patience:
            raise Busy(machine, _words(holder))
        time.sleep(_POLL)


def _died(holder: str) -> bool:
    """Whether that is the name of one that was killed: whoever holds it now has not written its own over it yet."""
    pid = holder.partition(" ")[2]
    return pid.isdigit() and not Path("/proc", pid).exists()


def _words(holder: str) -> str:
    name, _, pid = holder.partition(" ")
    return f"{name} by process {pid}" if pid.isdigit() else holder


def _hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()
