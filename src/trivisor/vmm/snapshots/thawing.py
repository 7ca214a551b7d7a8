"""The way back: what a machine was frozen in is checked, and then its engine goes on with it, or has its files of it."""

from __future__ import annotations

import time

from trivisor.core.errors import InvalidSpec, NotFound, UnsupportedByWall
from trivisor.core.spec import Wall
from trivisor.core.undo import Undo
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box, Engine, Progress
from trivisor.vmm.freezer import Freezer
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import packed, table
from trivisor.vmm.snapshots.model import Kept


def freezer(context: Context, wall: Wall, machine: str, what: str, *, memory: bool = False) -> Freezer:
    """Return the engine of `wall` if it can freeze machines, with their memory if that is asked. Raises UnsupportedByWall."""
    engine = context.engine(wall, machine)
    able = [name for name, other in context.engines.items() if isinstance(other, Freezer) and (not memory or with_memory(other))]
    if not isinstance(engine, Freezer) or (memory and not with_memory(engine)):
        raise UnsupportedByWall(what, wall, able, machine=machine)
    return engine


def with_memory(engine: Engine) -> bool:
    """Whether an engine can freeze a machine's memory too, for all that is known without trying."""
    return isinstance(engine, Freezer) and bool(getattr(engine, "freezes_memory", True))


def thaw(context: Context, row: Row, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
    """Have the machine go on as it was frozen in `row.ice`; return facts. Raises what Freezer.thaw and packed.ready raise."""
    kept = found(context, row.ice, row)
    engine = freezer(context, row.spec.wall, row.name, "go on with a machine's memory", memory=True)
    engine.fits(box, kept.about.needs)
    place = packed.ready(context, kept)
    facts = engine.thaw(box, place, other=kept.machine != row.id, undo=undo, progress=progress)
    used(context, kept)
    return facts


def begun(row: Row) -> None:
    """Raise InvalidSpec for a machine that is still to go on from what it was frozen in: what it has is there, and not yet its own."""
    if row.ice:
        raise InvalidSpec(f"{row.name} is still to go on from where it was frozen", machine=row.name, hint="start it first")


def found(context: Context, frozen: str, row: Row) -> Kept:
    """Return the frozen machine with that id. Raises NotFound."""
    kept = table.get(context.records, frozen)
    if kept is None:
        raise NotFound(f"what {row.name} was frozen in is gone", machine=row.name, hint="restore another snapshot, or delete it")
    return kept


def used(context: Context, kept: Kept) -> None:
    """Write down that a machine came from it."""
    table.update(context.records, kept.id, used=time.time())
