"""The ids that machines get on this host, and what else that depends on: found out by trying (`probe`), once a process.

Four shapes, the strongest first:

own      as root: each machine has a range of its own, and idmapped mounts show it its files with the ids on the disk
same     as root, where the file system or the kernel has no idmapped mounts: a user namespace in which ids are what they are
         outside. Root inside has power over nothing outside, but is the owner of root's files
subids   rootless: the caller is root inside, and the other ids are those that /etc/subuid gives (through newuidmap)
single   rootless without those: root is all there is inside
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from trivisor.core.errors import EngineError, HostLacks
from trivisor.launch import container, once, tvinit
from trivisor.launch.container import Ids, Range
from trivisor.launch.jail import FIRST_ID, SLOTS, TRIAL_TIMEOUT, USAGE, remedy
from trivisor.launch.plan import Op, Plan

Kind = Literal["own", "same", "subids", "single"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The strongest first."""

SIZE = 1 << 16
FIRST = FIRST_ID + SLOTS
"""Above the single ids of jails."""
_MACHINES = (0xFFFFFFFE - FIRST) // SIZE
_OPTIONAL = ("time", "cgroup")
"""Namespaces that older kernels lack."""
_WORDS: dict[Kind, str] = {
    "own": "a range of its own",
    "same": "those of the host, in a user namespace",
    "subids": "the caller's, and its subordinate ids",
    "single": "the caller's alone",
}


@dataclass(frozen=True)
class Shape:
    """What a container can have here."""

    kind: Kind
    namespaces: tuple[str, ...]
    why: str = ""
    """Why it is not a stronger one."""
    subordinate: tuple[tuple[Range, ...], tuple[Range, ...]] = ((), ())

    def ids(self, slot: int) -> Ids:
        """Return the ids of the machine with this slot."""
        if self.kind == "own":
            ranges = ((0, FIRST + slot % _MACHINES * SIZE, SIZE),)
            return Ids(ranges, ranges, mapped=True)
        if self.kind == "same":
            return Ids(((0, 0, SIZE),), ((0, 0, SIZE),))
        users, groups = self.subordinate
        return Ids(((0, os.geteuid(), 1), *users), ((0, os.getegid(), 1), *groups))

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the strongest has and this one has not, in words."""
        lacks = {
            "own": (),
            "same": ("a range of ids of its own",),
            "subids": ("a range of ids of its own",),
            "single": ("a range of ids of its own", "users other than root"),
        }[self.kind]
        return (*lacks, *(f"a {name} namespace" for name in _OPTIONAL if name not in self.namespaces))

    def __str__(self) -> str:
        return _WORDS[self.kind] + (f" ({self.why})" if self.why else "")


def subordinate(file: str, own: int) -> tuple[Range, ...]:
    """Return the ranges that /etc/subuid or /etc/subgid (subuid(5)) gives this user, for ids from 1 on, up to SIZE in all."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return ()
    try:
        name = pwd.getpwuid(own).pw_name
    except KeyError:
        name = ""
    ranges: list[Range] = []
    first = 1
    for line in lines:
        words = line.split(":")
        if len(words) == 3 and words[0] in (name, str(own)) and words[1].isdigit() and words[2].isdigit() and first < SIZE:
            count = min(int(words[2]), SIZE - first)
            if count:
                ranges.append((first, int(words[1]), count))
                first += count
    return tuple(ranges)


def _shapes() -> Iterator[Shape]:
    if os.geteuid() == 0:
        yield Shape("own", container.NAMESPACES)
        yield Shape("same", container.NAMESPACES)
    elif shutil.which("newuidmap") and shutil.which("newgidmap"):
        both = subordinate("/etc/subuid", os.geteuid()), subordinate("/etc/subgid", os.geteuid())
        if all(both):
            yield Shape("subids", container.NAMESPACES, subordinate=both)
    yield Shape("single", container.NAMESPACES)


def _trial(shape: Shape, folder: Path) -> Plan:
    """The parts of a container that hosts refuse, and a folder of the home shown with its ids."""
    ids = shape.ids(0)
    program = str(tvinit.path())
    plan: list[Op] = [("namespaces", *shape.namespaces), *ids.plan()]
    plan += [("root", "/"), ("bind", program, program, "ro,exec"), ("mount", "proc", "proc", "/proc", "rw", "")]
    plan += [("bind", str(folder), "/home", "ro,idmap" if ids.mapped else "ro"), ("pivot",), ("caps",), ("no-new-privs",)]
    return (*plan, ("exec", program, "launch"))


def _try(shape: Shape, folder: Path) -> str:
    done = once.run(_trial(shape, folder), TRIAL_TIMEOUT)
    return "" if done.status == USAGE else done.said or f"a trial exited with {done.status}"


@functools.lru_cache(maxsize=64)
def _probe(_uid: int, folder: Path, _device: int) -> Shape:
    why = fault = ""
    for shape in _shapes():
        for names in (container.NAMESPACES, tuple(name for name in container.NAMESPACES if name not in _OPTIONAL)):
            tried = replace(shape, namespaces=names, why=why)
            fault = _try(tried, folder)
            if not fault:
                return tried
        why = why or fault
    raise HostLacks(f"this host lets no container be made: {fault}", hint=remedy())


def probe(home: Path) -> Shape:
    """Return the strongest shape that works here for machines whose files lie in `home`. Takes some 5 ms, once a process and file system.

    Raises HostLacks, with what to switch on, where none does.
    """
    return _probe(os.geteuid(), home, home.stat().st_dev)


def run_as_root(argv: Sequence[str], timeout: float = 600.0) -> None:
    """Run a program as root: of this host, or of a user namespace with the ids that containers get. Raises EngineError."""
    said = ""
    for shape in _shapes():
        plan: list[Op] = []
        if os.geteuid() != 0:
            plan += [("namespaces", "user"), *shape.ids(0).plan()]
        done = once.run((*plan, ("exec", *argv)), timeout)
        said = done.said
        if not done.status:
            return
    raise EngineError(f"{argv[0]} failed", command=list(argv), output=said)


def remove_tree(path: Path, timeout: float = 600.0) -> None:
    """Remove a folder as root, as `run_as_root` has it. Raises EngineError."""
    try:
        run_as_root([shutil.which("rm") or "/bin/rm", "-rf", "--", str(path)], timeout)
    except EngineError as error:
        raise EngineError(f"{path} cannot be removed", output=error.output) from error
