"""`vm.memory` of a machine: what its wall and its record say to the service (vos/memory/service.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from trivisor.core.errors import FileError, TrivisorError, UnsupportedByWall
from trivisor.core.spec import checked
from trivisor.core.state import State
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm import dedupe, life, limits, locks, modify, reconcile, swapping
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vos.files import Files
from trivisor.vos.memory.service import Memory
from trivisor.vos.memory.stats import MemoryStats, of_guest
from trivisor.vos.ports import MemoryPort, Still

_WAIT = 10.0
"""Seconds that a reader of memory waits for another operation on the machine."""
_IDLE: dict[str, Any] = {"operation": "", "operator": None}
_FIGURES_MAX = 64 << 10
_FIGURES = {"meminfo": "/proc/meminfo", "vmstat": "/proc/vmstat", "pressure": "/proc/pressure/memory"}


def service(context: Context, machine: str, name: str, check: Callable[[str], Row], files: Callable[[], Files]) -> Memory:
    """Return `vm.memory` of a machine, of which `check` gives the record if it is in a state for a verb, `files` its files."""
    return Memory(
        name,
        port=lambda: port(context, check("memory")),
        figures=lambda: stats(context, check("memory"), files),
        limit=partial(modify.limit, context, machine, files),
        balloon=partial(modify.balloon, context, machine),
        reclaim=lambda size: modify.reclaim(context, check("memory"), files, size),
        merge=partial(merge, context, machine),
        swap=partial(swapping.swap, context, machine),
    )


def port(context: Context, row: Row) -> MemoryPort:
    """Return what a machine's wall does for its memory."""
    found = context.engine(row.spec.wall, row.name).memory(context.box(row))
    return replace(found, hold=partial(_hold, context, row, found.hold))


def stats(context: Context, row: Row, files: Callable[[], Files]) -> MemoryStats:
    """Return the figures of a machine that runs or is paused: its control group's, or its guest's own."""
    taken = context.engine(row.spec.wall, row.name).usage(context.box(row))
    if row.spec.wall == "vm":
        said = dict.fromkeys(_FIGURES, "")
        for name, path in _FIGURES.items() if row.state is State.RUNNING else ():
            with suppress(FileError):  # a kernel without it
                said[name] = files().read(path, 0, _FIGURES_MAX).decode("ascii", "replace")
        figures = of_guest(modify.has(context, row), taken.private, taken.shared, **said)
        return replace(figures, merged=dedupe.merged(context, row))
    group = Cgroup.find(context.home, row.id)
    use = group.memory() if group is not None else None
    return MemoryStats(
        limit=use.limit if use else None,
        used=use.used if use else None,
        cache=use.cache if use else None,
        swap=use.swap if use else None,
        pressure=use.pressure if use else None,
        major_faults=use.major_faults if use else None,
        private=taken.private,
        shared=taken.shared,
        merged=dedupe.merged(context, row),
    )


def merge(context: Context, machine: str, on: bool) -> None:
    """Have the host's kernel merge a machine's pages with equal ones, or not: now if it runs, and from its next start on."""
    dedupe.check()
    with life.operation(context, machine, "dedupe") as row:
        spec = checked(msgspec.structs.replace(row.spec, dedupe=on))
        engine = context.engine(spec.wall, row.name)
        engine.check(spec)
        if row.state in reconcile.LIVE and on != row.spec.dedupe:
            if not isinstance(engine, dedupe.Merging):
                raise UnsupportedByWall("begin or end to merge the pages of a machine that runs", spec.wall, ("vm",), machine=row.name)
            engine.merge(context.box(row), on)
        context.records.update(row.id, spec=spec, event=("dedupe", "on" if on else "off"), **_IDLE)


def starved(context: Context, machine: str, files: Callable[[], Files], known: int) -> bool:
    """Say whether the kernel killed more in a machine for want of memory than the `known`; then its record says so."""
    row = context.records.row(machine)
    if row is None:
        return False
    if limits.note(context, row).oom_kills > known:
        return True
    # A guest's kernel of its own.
    if not isinstance(context.engine(row.spec.wall, row.name), dedupe.Merging):
        return False
    with suppress(TrivisorError):
        said = files().read(_FIGURES["vmstat"], 0, _FIGURES_MAX).decode("ascii", "replace")
        found = re.search(r"^oom_kill (\d{1,9})$", said, re.MULTILINE)
        if found is not None and int(found[1]) > known:
            limits.await_console(context, row, int(found[1]))
            return True
    return False


@contextmanager
def _hold(context: Context, row: Row, hold: Callable[[bool], AbstractContextManager[Still]], still: bool) -> Iterator[Still]:
    """Nobody pauses or resumes a machine that stands still for its memory to be read."""
    with ExitStack() as stack:
        if still:
            stack.enter_context(locks.hold(context.folder(row).lock, "memory", row.name, wait=_WAIT, make=False))
        yield stack.enter_context(hold(still))
