"""Control groups of machines: what a machine may take, whether it is frozen, what it took, and the end of all that is in it.

A machine's group is `trivisor-HOME/MACHINE` in each hierarchy that it needs (cgroup_layout.py), where HOME is made of the
home's place, so that homes never sweep each other's. The file `cgroups` in the machine's folder names them before they
are made: a process that would find other bases, having been started elsewhere, finds the same groups.

A process joins the group of each of `fds`; whoever freezes and kills stays outside. Writing to cgroup.procs waits for an
RCU grace period, some 10 ms on a busy host. What does not: in v1 "0" written to `tasks` by a process with one thread; in
v2 clone3(2) with CLONE_INTO_CGROUP. A cgroup namespace is entered (unshare(2)) after all have been joined: clone's
CLONE_NEWCGROUP would take the parent's groups for its roots.

A limit that was asked for and cannot be had is an error. Of the others, what cannot be had is in `lacks`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.paths import Home
from trivisor.launch import cgroup_freeze, cgroup_make, cgroup_memory, cgroup_oom
from trivisor.launch import cgroup_layout as layouts
from trivisor.launch.cgroup_layout import Hierarchy, Layout
from trivisor.launch.cgroup_limits import CONTROLLER, Limits, settings, unlimited_swap
from trivisor.launch.cgroup_memory import MemoryUse
from trivisor.launch.cgroup_place import Place, await_event, folders, kill_each, remove_tree, write

__all__ = ["Cgroup", "Counters", "Limits", "Usage", "limits_possible", "names", "remove", "sweep"]

TIMEOUT = 10.0
"""Seconds that a group may take to freeze, to empty, or to be removed."""


@dataclass(frozen=True)
class Usage:
    """What a group takes now. Bytes and seconds; what the host does not count is 0."""

    memory: int = 0
    peak: int = 0
    anonymous: int = 0
    """Of `memory`, and of swap, what belongs to no file of a disk."""
    cpu_seconds: float = 0.0
    pids: int = 0


@dataclass(frozen=True)
class Counters:
    """How often a limit was met since the group was made."""

    oom_kills: int = 0
    """Processes that the kernel killed because the group had no memory left."""
    pids_refused: int = 0


class Cgroup:
    """One machine's groups, in all hierarchies. Got from `create` and `find`."""

    def __init__(self, places: Iterable[Place], lacks: Iterable[str] = ()) -> None:
        self._places = tuple(places)
        self._fds: list[int] = []
        self.lacks = tuple(lacks)
        """What was not asked for and cannot be had here, in words."""

    @classmethod
    def create(cls, home: Home, machine: str, limits: Limits, *, layout: Layout | None = None) -> Self:
        """Make the groups of a machine and set its limits. Raises HostLacks for a limit that was asked for and cannot be had."""
        layout = layout or layouts.layout()
        wanted, lacks = _wanted(limits, layout)
        family = family_name(home)
        # v2 counts processor time in every group.
        controllers = {CONTROLLER[name] for name in wanted} | {"freezer"} | ({"cpuacct"} if layout.unified is None else set())
        used = [(found, found.controllers & controllers) for found in layout.hierarchies if _needed(layout, found, controllers)]
        places = [Place(found.base / family / machine, names, found.unified) for found, names in used]
        _note(home, machine, places)
        group = cls(places, lacks)
        try:
            for found, place in zip((found for found, _ in used), places, strict=True):
                cgroup_make.make(found, place)
            for name in wanted:
                if fault := group._limit(limits, name, home):
                    group.lacks += (fault,)
        except BaseException:
            group.remove()
            raise
        return group

    @classmethod
    def find(cls, home: Home, machine: str) -> Self | None:
        """Return the groups that a machine has, or None."""
        try:
            lines = _file(home, machine).read_text().splitlines()
        except OSError:
            return None
        places = []
        for line in lines:
            kind, _, rest = line.partition(" ")
            names, _, path = rest.partition(" ")
            if path.startswith("/"):
                places.append(Place(Path(path), frozenset(names.split(",")), kind == "v2"))
        return cls(place for place in places if place.path.is_dir()) if any(place.path.is_dir() for place in places) else None

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors of the groups' folders, to join by; open until `close`."""
        if not self._fds:
            self._fds = [os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for place in self._places]
        return tuple(self._fds)

    def close(self) -> None:
        """Close `fds`. The groups stay."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def hierarchies(self) -> tuple[tuple[str, str], ...]:
        """Where its hierarchies are mounted on a host, and with which options: of v1 those with limits and figures; of v2 alone, "", ""."""
        old = [place.path.parent.parent.name for place in self._places if not place.unified and place.controllers - {"freezer", "io"}]
        if not old and self._unified() is not None:
            return (("", ""),)
        return tuple((name, name) for name in old)

    # -- frozen -----------------------------------------------------------------------------------

    def freeze(self, timeout: float = TIMEOUT) -> None:
        """Stop all that is in it; when this returns nothing in it runs. Raises HostLacks, EngineError."""
        self._set_frozen(True, timeout)

    def thaw(self, timeout: float = TIMEOUT) -> None:
        """Let it go on. Raises HostLacks, EngineError."""
        self._set_frozen(False, timeout)

    @contextmanager
    def thawed_without_us(self) -> Iterator[None]:
        """See to it that it goes on if this process dies within the `with`: a shell waits for that. Raises HostLacks."""
        place = self._of("freezer")
        if place is None:
            raise HostLacks("this host has no freezer that can be used", hint=layouts.layout().remedies.get("freezer", ""))
        with subprocess.Popen(
            ["/bin/sh", "-c", 'read word; [ "$word" ] || printf "$1" > "$2"', "sh", *cgroup_freeze.words(place)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        ) as waiter:
            assert waiter.stdin is not None
            try:
                yield
            finally:
                with suppress(BrokenPipeError):
                    os.write(waiter.stdin.fileno(), b"done\n")

    def make_killable(self) -> None:
        """See to it that what is killed dies: in v1 it does so only when it is not frozen."""
        place = self._of("freezer")
        if place is not None and not place.unified:
            self._set_frozen(False, TIMEOUT)

    @property
    def can_freeze(self) -> bool:
        return self._of("freezer") is not None

    @property
    def frozen(self) -> bool:
        place = self._of("freezer")
        return place is not None and cgroup_freeze.frozen(place)

    def _set_frozen(self, frozen: bool, timeout: float) -> None:
        place = self._of("freezer")
        if place is None:
            raise HostLacks("this host has no freezer that can be used", hint=layouts.layout().remedies.get("freezer", ""))
        try:
            done = (cgroup_freeze.freeze if frozen else cgroup_freeze.thaw)(place, timeout)
        except OSError as error:
            raise EngineError(f"the freezer of {place.path} cannot be written", output=str(error)) from error
        if not done:
            verb = "freeze" if frozen else "thaw"
            raise EngineError(f"the machine did not {verb} in {timeout:g} s", hint="a process in it waits for a disk")

    # -- what it took -----------------------------------------------------------------------------

    def usage(self) -> Usage:
        memory, pids = self._of("memory"), self._of("pids")
        found: dict[str, int] = {}
        if memory is not None:
            stat = memory.table("memory.stat")
            if memory.unified:
                found = {"memory": memory.number("memory.current"), "peak": memory.number("memory.peak")}
                found["anonymous"] = stat.get("anon", 0) + stat.get("shmem", 0) + memory.number("memory.swap.current")
            else:
                found = {"memory": memory.number("memory.usage_in_bytes"), "peak": memory.number("memory.max_usage_in_bytes")}
                found["anonymous"] = stat.get("total_rss", 0) + stat.get("total_shmem", 0) + stat.get("total_swap", 0)
        return Usage(**found, cpu_seconds=self._seconds(), pids=pids.number("pids.current") if pids is not None else len(self.pids()))

    def memory(self) -> MemoryUse | None:
        """Return the figures of its memory; None where memory is not counted."""
        place = self._of("memory")
        return cgroup_memory.read(place) if place is not None else None

    def limit_memory(self, limits: Limits, home: Home, *, growing: bool) -> None:
        """Change the limits of memory and swap of a group that has one. Raises HostLacks for what the kernel refuses."""
        names = [name for name in ("memory", "swap") if name in limits.given]
        # In v1 the two together may never be less than the one.
        for name in reversed(names) if growing else names:
            self._limit(limits, name, home)

    def limit_cpus(self, limits: Limits, home: Home) -> bool:
        """Change its share of the processors, if it has one that can be; say whether. Raises HostLacks for what the kernel refuses."""
        return self._of(CONTROLLER["cpus"]) is not None and not self._limit(limits, "cpus", home)

    def reclaim(self, size: int) -> int:
        """Have the kernel take back up to `size` bytes from it; return how many it took. 0 where memory is not counted."""
        place = self._of("memory")
        return cgroup_memory.reclaim(place, size) if place is not None else 0

    def limit_swap(self, limits: Limits, home: Home) -> None:
        """Change how much of the host's swap it may have beside its memory. Raises HostLacks for what the kernel refuses."""
        place = self._of("memory")
        if limits.swap is not None:
            self._limit(limits, "swap", home)
        elif place is not None:
            for setting in unlimited_swap(unified=place.unified):
                cgroup_make.apply(place, setting)

    @contextlib.contextmanager
    def ending(self, wanted: bool) -> Iterator[int | None]:
        """If it is `wanted`, have all in it end when one program is killed for want of memory; give what tells the keeper of it, if it must
        be told. Raises HostLacks."""
        place = self._of("memory") if wanted else None
        if wanted and place is None:
            raise HostLacks('oom="stop" cannot be had on this host', hint=layouts.layout().remedies.get("memory", ""))
        try:
            told = cgroup_oom.end_with_one(place) if place is not None else None
        except OSError as error:
            raise HostLacks(f"this kernel does not tell when memory runs out: {error.strerror}", hint='leave out oom="stop"') from error
        try:
            yield told
        finally:
            if told is not None:
                os.close(told)

    def victims(self, count: int) -> tuple[str, ...]:
        """Return the names of the last `count` programs that were killed for want of memory, as far as they are known."""
        place = self._of("memory")
        return cgroup_oom.victims(place, count) if place is not None else ()

    def counters(self) -> Counters:
        """Return how often limits were met."""
        memory, pids = self._of("memory"), self._of("pids")
        killed = memory.table("memory.events" if memory.unified else "memory.oom_control").get("oom_kill", 0) if memory else 0
        return Counters(killed, pids.table("pids.events").get("max", 0) if pids else 0)

    def pids(self) -> list[int]:
        """Return the processes in it, those of its nested groups left out."""
        return self._places[0].pids() if self._places else []

    # -- its end ----------------------------------------------------------------------------------

    def kill(self, timeout: float = TIMEOUT) -> None:
        """End every process in it, frozen or not, and wait until there is none. Raises EngineError if one stays."""
        place = self._unified() or self._of("freezer") or (self._places[0] if self._places else None)
        if place is None or not place.path.exists():
            return
        if place.unified and (place.path / "cgroup.kill").exists():
            with contextlib.suppress(OSError):  # it is gone, or goes; if not, that is told from what happens
                write(place.path / "cgroup.kill", "1")
            done = await_event(place, "populated", 0, timeout)
        else:
            done = kill_each(place, timeout)
        if not done:
            what = f"processes in {place.path} outlived their kill by {timeout:g} s"
            raise EngineError(what, hint="one waits for a disk that does not answer")

    def remove(self, timeout: float = TIMEOUT) -> None:
        """Kill what is in it and remove it. That it is gone already is no error. Raises EngineError."""
        self.close()
        self.kill(timeout)
        for place in self._places:
            remove_tree(place.path, timeout)
            with contextlib.suppress(OSError):  # other machines of the home are in it
                place.path.parent.rmdir()

    # -- inside -----------------------------------------------------------------------------------

    def _of(self, controller: str) -> Place | None:
        return next((place for place in self._places if controller in place.controllers), None)

    def _unified(self) -> Place | None:
        return next((place for place in self._places if place.unified), None)

    def _seconds(self) -> float:
        if (unified := self._unified()) is not None:
            return unified.table("cpu.stat").get("usage_usec", 0) / 1e6
        account = self._of("cpuacct")
        return account.number("cpuacct.usage") / 1e9 if account is not None else 0.0

    def _limit(self, limits: Limits, name: str, home: Home) -> str:
        """Set one limit. Returns what is missing where it was not asked for."""
        place = self._of(CONTROLLER[name])
        try:
            assert place is not None
            for setting in settings(limits, name, unified=place.unified, disk=home.root):
                cgroup_make.apply(place, setting)
        except HostLacks as error:
            if name in limits.asked:
                raise
            return str(error)
        return ""


def family_name(home: Home) -> str:
    """Return the name of the group that holds those of a home's machines."""
    root = home.root.resolve()
    about = root.stat()
    return "trivisor-" + hashlib.sha256(f"{root}\0{about.st_dev}\0{about.st_ino}".encode()).hexdigest()[:12]


def limits_possible(limits: Limits, layout: Layout | None = None) -> dict[str, str]:
    """Return of each limit given that cannot be enforced here why not. Raises HostLacks if one of them was asked for."""
    layout = layout or layouts.layout()
    _wanted(limits, layout)
    return {name: layout.lacks[CONTROLLER[name]] for name in limits.given if layout.of(CONTROLLER[name]) is None}


def remove(home: Home, machine: str, timeout: float = TIMEOUT) -> None:
    """Kill what is left in a machine's groups and remove them; it may have none. Raises EngineError."""
    group = Cgroup.find(home, machine)
    if group is not None:
        group.remove(timeout)
    with contextlib.suppress(OSError):  # the folder may be gone, or about to go with the file in it
        _file(home, machine).unlink(missing_ok=True)


def names(home: Home) -> set[str]:
    """Return the machines for which there are groups, whether a row knows them or not."""
    return {path.name for family in _families(home) for path in folders(family)}


def sweep(home: Home, machines: Iterable[str]) -> list[str]:
    """Remove the groups of these machines, which no row names; return what was done, in words. Raises EngineError."""
    said = []
    for machine in sorted(machines):
        for found in layouts.layout().hierarchies:
            place = Place(found.base / family_name(home) / machine, found.controllers, found.unified)
            if place.path.is_dir():
                Cgroup([place]).remove()
                said.append(f"cgroup {place.path}: removed, no machine names it")
    return said


# -- making ---------------------------------------------------------------------------------------


def _wanted(limits: Limits, layout: Layout) -> tuple[list[str], list[str]]:
    """Return the limits to set, and what is missing for the others."""
    wanted, lacks = [], []
    for name in limits.given:
        controller = CONTROLLER[name]
        if layout.of(controller) is not None:
            wanted.append(name)
        elif name in limits.asked:
            raise HostLacks(f"{name} cannot be limited on this host: {layout.lacks[controller]}", hint=layout.remedies[controller])
        else:
            lacks.append(f"{name} is not limited: {layout.lacks[controller]}")
    if layout.of("freezer") is None:
        lacks.append(f"pause: {layout.lacks['freezer']}")
    return wanted, lacks


def _needed(layout: Layout, found: Hierarchy, controllers: set[str]) -> bool:
    """Of two hierarchies with the same controller, the first one is used."""
    return any(layout.of(name) is found for name in found.controllers & controllers)


def _file(home: Home, machine: str) -> Path:
    return home.machine(machine).root / "cgroups"


def _note(home: Home, machine: str, places: Iterable[Place]) -> None:
    lines = [f"{'v2' if place.unified else 'v1'} {','.join(sorted(place.controllers))} {place.path}\n" for place in places]
    _file(home, machine).write_text("".join(lines))


def _families(home: Home) -> list[Path]:
    return [found.base / family_name(home) for found in layouts.layout().hierarchies]
