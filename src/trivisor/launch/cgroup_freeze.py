"""Freezing a group, also while some of its tasks wait for the answer to a system call.

A task whose call was taken up by who answers it (seccomp_unotify(2)) waits in the kernel until it is answered or killed: so it must
be, or a handler would carry a call out twice. The freezer cannot have it until then, and says of the whole group that it is
still freezing. It runs none of the program's code, though, and freezes before it would. So a group counts as frozen here
when each of its tasks is frozen or waits so, which is what the kernel's name of the function that it sleeps in tells (wchan, proc(5)).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from trivisor.launch.cgroup_place import Place, await_event, poll_until, write

_FROZEN = ("do_freezer_trap", "get_signal", "__refrigerator", "cgroup_enter_frozen", "cgroup_leave_frozen")
"""v2 (the first is often inlined into the second), v1."""
_HELD = ("seccomp_do_user_notification", "wait_for_vfork_done", "kernel_clone")
"""The first; whoever forked (vfork(2)) one that is held at its execve(2), and by the kernel's own count is frozen."""
_STILL = "TtZX"
"""States of tasks that run nothing: stopped, traced, dead."""
_PATIENCE = 0.03
"""Seconds that the kernel is given before we look for ourselves, and between two looks."""


def freeze(place: Place, timeout: float) -> bool:
    """Stop all that is in it. False, and all goes on, if something still ran after `timeout` seconds. Raises OSError."""
    deadline = time.monotonic() + timeout
    write(place.path / _file(place), "1" if place.unified else "FROZEN")
    while True:
        if _wait(place, frozen=True, timeout=min(_PATIENCE, max(0.0, deadline - time.monotonic()))) or still(place):
            return True
        if time.monotonic() >= deadline:
            write(place.path / _file(place), "0" if place.unified else "THAWED")
            return False


def thaw(place: Place, timeout: float) -> bool:
    """Let it go on. False if it had not after `timeout` seconds. Raises OSError."""
    write(place.path / _file(place), "0" if place.unified else "THAWED")
    return _wait(place, frozen=False, timeout=timeout)


def words(place: Place) -> tuple[str, Path]:
    """Return what to write, and where, for it to go on."""
    return ("0" if place.unified else "THAWED"), place.path / _file(place)


def frozen(place: Place) -> bool:
    """Tell whether it is, or is being made so: an answered call takes its task from waiting to frozen, and that for a moment is neither."""
    said = place.read(_file(place)).strip()
    return said == "1" if place.unified else said in ("FROZEN", "FREEZING")


def still(place: Place) -> bool:
    """Tell whether each task in it is frozen, or waits for the answer to a call."""
    tasks = place.read("cgroup.threads" if place.unified else "tasks").split()
    return all(_sleeps(task) for task in tasks if task != "0")


def _file(place: Place) -> str:
    return "cgroup.freeze" if place.unified else "freezer.state"


def _wait(place: Place, *, frozen: bool, timeout: float) -> bool:
    if place.unified:
        return await_event(place, "frozen", int(frozen), timeout)
    said = "FROZEN" if frozen else "THAWED"
    return poll_until(lambda: place.read("freezer.state").strip() == said, timeout)


def _sleeps(task: str) -> bool:
    with contextlib.suppress(OSError):  # it has ended
        # The compiler may have made a clone of the function, and have put a dot and letters after its name.
        if Path(f"/proc/{task}/wchan").read_text().partition(".")[0] in _FROZEN + _HELD:
            return True
        return Path(f"/proc/{task}/stat").read_text().rpartition(") ")[2][:1] in _STILL
    return True
