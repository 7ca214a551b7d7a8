"""A machine frozen for others to begin in, for as long as the process that froze it lives: nobody sees it, and the sweep removes it."""

from __future__ import annotations

from typing import Any

import msgspec

from trivisor.core import spec as specs
from trivisor.core.errors import StorageError
from trivisor.vmm import life
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import keeping, table, thawing, verbs
from trivisor.vmm.snapshots.model import About, Kept, Kind

_IDLE: dict[str, Any] = {"operation": "", "operator": None}


def freeze(context: Context, machine: str) -> Kept:
    """Freeze a machine with its memory; it has ended then. Raises what Freezer.freeze raises, and UnsupportedByWall."""
    with life.operation(context, machine, "fork") as row:
        engine = thawing.freezer(context, row.spec.wall, row.name, "be forked", memory=True)
        kept = keeping.begin(context, row, Kind.FORK, about=About(memory=True))
        try:
            into = keeping.plain(context, kept.id)
            frozen = engine.freeze(context.box(row), into, memory=True, ends=True, lasting=False, progress=lambda _: None)
            about = keeping.about(kept, needs=dict(frozen.needs), paused=frozen.paused, facts=dict(frozen.facts))
            table.update(context.records, kept.id, about=about)
            context.records.update(row.id, **_IDLE)
        except BaseException:
            keeping.drop(context, kept.id)
            raise
    return msgspec.structs.replace(kept, about=about)


def child(context: Context, kept: Kept, name: str) -> Row:
    """Make a machine whose start goes on where it was frozen. Raises what VMM.create raises."""
    spec = msgspec.structs.replace(kept.spec, name=name, ports=dict(verbs.free_ports(list(kept.spec.ports.values()))))
    return verbs.create(context, kept, specs.checked(spec))


def drop(context: Context, kept: Kept) -> None:
    """Have it go: now, or with the last machine that began in it."""
    try:
        if not keeping.drop(context, kept.id):
            table.update(context.records, kept.id, maker=None)
    except StorageError:
        table.update(context.records, kept.id, maker=None)  # the sweep removes it
