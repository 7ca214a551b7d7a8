"""The tree of snapshots: which came after which, and which machines came from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from trivisor.vmm.context import Context
from trivisor.vmm.snapshots import keeping, model, table
from trivisor.vmm.snapshots.model import Kept, Snapshot


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot, and what came after it."""

    snapshot: Snapshot
    machines: tuple[str, ...] = ()
    """The machines that it is the last snapshot of, and those made from it since."""
    children: tuple[Branch, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield it as a person reads it, a line each."""
        todo = [(self, "")]
        while todo:
            one, indent = todo.pop()
            words = [one.snapshot.ref, *(["memory"] if one.snapshot.memory else []), *(f"#{tag}" for tag in one.snapshot.tags)]
            yield f"{indent}{' '.join(words)}" + (f"  <- {', '.join(one.machines)}" if one.machines else "")
            todo += [(child, indent + "  ") for child in reversed(one.children)]


def tree(context: Context) -> tuple[Branch, ...]:
    """Return the snapshots that came after no other, with those that came after them."""
    rows = {kept.id: kept for kept in table.rows(context.records)}
    listed = [kept for kept in rows.values() if kept.listed and not keeping.expired(kept)]
    machines: dict[str, list[str]] = {}
    for row in context.records.rows():
        machines.setdefault(seen(row.ancestor, rows), []).append(row.name)
    below: dict[str, list[Branch]] = {}
    for kept in reversed(listed):  # one that came after another was made later
        parent = seen(kept.parent, rows)
        found = model.public(kept, rows[parent].ref or "" if parent else "")
        children = tuple(reversed(below.pop(kept.id, [])))
        below.setdefault(parent, []).append(Branch(snapshot=found, machines=tuple(machines.get(kept.id, ())), children=children))
    return tuple(reversed(below.get("", [])))


def seen(frozen: str, rows: Mapping[str, Kept]) -> str:
    """Return the id of the nearest snapshot that is listed, from this one on backwards; "" if there is none."""
    while frozen in rows:
        if rows[frozen].listed and not keeping.expired(rows[frozen]):
            return frozen
        frozen = rows[frozen].parent
    return ""
