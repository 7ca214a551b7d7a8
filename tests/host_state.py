"""What a home has on the host: the processes that hold its files, its mounts, its sockets. For tests that look for leftovers."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path


def processes(home: Path) -> dict[int, str]:
    """Return {pid: command} of the processes, other than this one, that have a file under `home` open or name it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _holds(entry, str(home)):
            found[int(entry.name)] = _command(entry)
    return found


def sockets(home: Path) -> list[Path]:
    return [path for path in (home / "machines").rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]


def mounts(home: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {home}/" in line]


def folders(home: Path) -> set[str]:
    return {entry.name for entry in (home / "machines").iterdir()}


def assert_nothing_left(home: Path, machines: set[str], *, within: float = 5.0) -> None:
    """Assert that the machines with these ids, none of them running, have their folders, and that there is nothing more."""
    deadline = time.monotonic() + within
    # A killed process is gone when it has been reaped by its parent, which nobody tells us of.
    while (left := processes(home)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert sockets(home) == []
    assert mounts(home) == []
    assert folders(home) == machines
    assert list((home / "tmp").iterdir()) == []


def _holds(process: Path, home: str) -> bool:
    try:
        if home in (process / "cmdline").read_bytes().decode(errors="replace"):
            return "pytest" not in _command(process)
        if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        return any(os.readlink(fd).startswith(home) for fd in (process / "fd").iterdir())
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False


def _command(process: Path) -> str:
    return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
