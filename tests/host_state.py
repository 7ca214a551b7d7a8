"""What a home has on the host: the processes that hold its files, its mounts, its sockets. For tests that look for leftovers."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path


def processes(home: Path) -> dict[int, str]:
    """Return {pid: command} of the processes, other than this one, that have a file under `home` open or name it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _holds(entry, str(home)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                found[int(entry.name)] = _command(entry)
    return found


def sockets(home: Path) -> list[Path]:
    found = []
    for place, _, names in os.walk(home / "machines"):  # which, unlike glob, bears that a folder goes meanwhile
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(path.lstat().st_mode):
                    found.append(path)
    return found


def mounts(home: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {home}/" in line]


def folders(home: Path) -> set[str]:
    return {entry.name for entry in (home / "machines").iterdir()}


class Leftovers:
    """What was on the host at one time; `since` says what came after that and is of these tests.

    Other programs run at the same time, so: what lies under `base`, the session's folder, in any form; what Trivisor names
    as its own; and a QEMU or passt that came since and has lost its keeper.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._began = _clock()
        self._named = _named()

    def since(self, within: float = 5.0) -> list[str]:
        deadline = time.monotonic() + within
        # A killed process is gone when it has been reaped by its parent, which nobody tells us of.
        # The same goes for network namespaces, which the kernel takes down with their interfaces in its own time.
        while ((left := self._processes()) or (named := _named() - self._named)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if left:
            named = _named() - self._named
        left += [f"mount {line}" for line in mounts(self._base)]
        left += [f"socket {line.split()[-1]}" for line in Path("/proc/net/unix").read_text().splitlines() if str(self._base) in line]
        # Not looked for once more: what others have for a moment may come between two looks.
        return left + sorted(named)

    def _processes(self) -> list[str]:
        found = {pid: command for pid, command in processes(self._base).items() if not _inherits(pid, os.getpid())}
        for pid, (parent, started, command) in _table().items():
            if parent == 1 and started > self._began and command.startswith(_OURS):
                found[pid] = command
        return [f"process {pid}: {command}" for pid, command in found.items()]


_OURS = ("qemu-system", "passt")


def _table() -> dict[int, tuple[int, int, str]]:
    """Return {pid: (parent, start in ticks since boot, program)} of all processes that are not dead."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (fields := (entry / "stat").read_text().rpartition(")")[2].split())[0] not in "ZX":
                found[int(entry.name)] = (int(fields[1]), int(fields[19]), _command(entry).split(" ")[0].rpartition("/")[2])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _inherits(pid: int, ancestor: int) -> bool:
    """Whether it is a child that a test's own process still has, which the test answers for."""
    table = _table()
    while pid in table and pid != ancestor:
        pid = table[pid][0]
    return pid == ancestor


def _clock() -> int:
    return int(float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK"))


def _named() -> set[str]:
    """Return what bears Trivisor's name, and every network interface, that nobody uses."""
    found = set()
    for entry in Path("/sys/class/net").iterdir():
        with contextlib.suppress(OSError):  # one with a carrier has somebody at its other end
            if (entry / "carrier").read_text() == "0\n":
                found.add(f"interface {entry.name}")
    # One with processes is of machines that somebody else runs; one that went while we looked is not left.
    for place, names, _ in os.walk("/sys/fs/cgroup"):  # which, unlike glob, bears that a folder goes meanwhile
        for path in (Path(place, name) for name in names if "trivisor" in name):
            with contextlib.suppress(OSError):
                if not any(procs.read_text() for procs in path.rglob("cgroup.procs")):
                    found.add(f"cgroup {path}")
    return found


def assert_nothing_left(home: Path, machines: set[str], *, within: float = 30.0) -> None:
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
        if any(_link(fd).startswith(home) for fd in (process / "fd").iterdir()):
            return True
        # A jailed engine sees none of these paths; its mounts tell where they come from.
        jailed = os.readlink(process / "ns/mnt") != os.readlink("/proc/self/ns/mnt")
        return jailed and f" {_within(home)}/" in (process / "mountinfo").read_text(errors="replace")
    except OSError:  # it has ended, ends now, or is nobody's business of ours
        return False


def _link(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:  # closed meanwhile, or a file whose path is longer than a path may be
        return ""


def _within(home: str) -> str:
    """Return the path of `home` in its own file system, as mountinfo has it."""
    at = Path(home)
    while not at.is_mount():
        at = at.parent
    return home if at == Path("/") else home.removeprefix(str(at))


def _command(process: Path) -> str:
    return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
