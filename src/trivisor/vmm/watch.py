"""Waiting for a machine's keeper to end."""

from __future__ import annotations

import math
import os
import select
import time

from trivisor.core.paths import MachineDir
from trivisor.core.process import Who
from trivisor.launch import keeper

_SLICE = 3600.0
_POLL = 0.1


def wait_ended(folder: MachineDir, timeout: float | None) -> bool:
    """Wait until no keeper holds the machine, at most `timeout` seconds; say whether that is so."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while keeper.alive(folder):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        fd = _pidfd(folder)
        if fd is None:
            # The keeper is of another pid namespace, or has ended this instant: flock(2) has no wait with a bound.
            time.sleep(min(left, _POLL))
            continue
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(min(left, _SLICE) * 1000)
        finally:
            os.close(fd)
    return True


def _pidfd(folder: MachineDir) -> int | None:
    """Return a pidfd of the very keeper that the machine's folder names."""
    try:
        who = Who.parse(folder.keeper.read_text())
        if who is None:
            return None
        fd = os.pidfd_open(who.pid)
    except (OSError, UnicodeDecodeError):
        return None
    if who.alive():
        return fd
    os.close(fd)
    return None
