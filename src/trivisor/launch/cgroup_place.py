"""One group in one hierarchy: its files, and waiting for what happens in it.

v2 wakes whoever polls cgroup.events; v1 tells nobody anything, so there, and for the moment in which a group that just
lost its last process is still busy, these look again and again, within a bound.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import EngineError

_POLL = 0.001


@dataclass(frozen=True)
class Place:
    """A group of ours in one hierarchy."""

    path: Path
    controllers: frozenset[str]
    unified: bool

    def read(self, file: str) -> str:
        """Return a file's text, or "" where the kernel has no such file or the group is gone."""
        try:
            return (self.path / file).read_text()
        except OSError:
            return ""

    def number(self, file: str) -> int:
        text = self.read(file).strip()
        return int(text) if text.isdigit() else 0

    def table(self, file: str) -> dict[str, int]:
        """Return a flat keyed file: lines of a word and a number."""
        return {words[0]: int(words[1]) for line in self.read(file).splitlines() if len(words := line.split()) == 2 and words[1].isdigit()}

    def pids(self) -> list[int]:
        """The processes in it; one of another pid namespace has no number here."""
        return [int(pid) for pid in self.read("cgroup.procs").split() if pid != "0"]


def write(file: Path, value: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def await_event(place: Place, key: str, value: int, timeout: float) -> bool:
    """Wait until cgroup.events says so: the kernel wakes pollers of it (cgroup-v2.rst)."""
    deadline = time.monotonic() + timeout
    try:
        fd = os.open(place.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return True
        raise
    try:
        poller = select.poll()
        poller.register(fd, select.POLLPRI)
        while True:
            if f"{key} {value}\n".encode() in os.pread(fd, 4096, 0):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # The kernel holds a second event within 10 ms of the first back for that long (cgroup_file_notify), so look between.
            poller.poll(max(1, min(left, _POLL) * 1000))
    except OSError as error:
        if error.errno == errno.ENODEV:  # somebody else removed it
            return True
        raise
    finally:
        os.close(fd)


def poll_until(done: Callable[[], bool], timeout: float) -> bool:
    """Poll until `done()`: a v1 hierarchy tells nobody of a change."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def kill_each(place: Place, timeout: float) -> bool:
    """Kill all that is there, again and again until nothing is: what is frozen meanwhile cannot fork."""
    file, stop, go = ("cgroup.freeze", "1", "0") if place.unified else ("freezer.state", "FROZEN", "THAWED")

    def empty() -> bool:
        if not place.pids():
            return True
        with contextlib.suppress(OSError):  # no freezer here
            write(place.path / file, stop)
        for pid in place.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            write(place.path / file, go)
        return False

    return poll_until(empty, timeout)


def folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, OSError):
        return []


def remove_tree(path: Path, timeout: float) -> None:
    """Remove a group and those in it. A group with processes that just ended is busy for a moment, and tells nobody when it is not."""
    with contextlib.suppress(OSError):  # most have none in them, and to list a group's files costs more than to remove it
        path.rmdir()
        return
    for nested in folders(path):
        remove_tree(nested, timeout)

    def gone() -> bool:
        try:
            path.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise EngineError(f"{path} cannot be removed", output=str(error)) from error
            return False
        return True

    if not poll_until(gone, timeout):
        raise EngineError(f"{path} cannot be removed", output="it is busy", hint="see which processes are in its cgroup.procs")
