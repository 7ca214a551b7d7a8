"""`vmm.snapshots`: the snapshots of a home."""

from __future__ import annotations

import builtins

from trivisor.vmm.context import Context
from trivisor.vmm.snapshots import keeping, model, table, verbs
from trivisor.vmm.snapshots.model import Kept, Kind, Snapshot


class Snapshots:
    """The snapshots of one home, of machines that are there and that are gone."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def list(self, machine: str | None = None, *, tag: str | None = None) -> builtins.list[Snapshot]:
        """Return those of the machine with that name or id, or of all, the oldest first; with `tag` those that have it."""
        kept = {one.id: one for one in table.rows(self._context.records)}
        found = [one for one in kept.values() if one.listed and not keeping.expired(one)]
        wanted = [one for one in found if machine in (None, one.name, one.machine) and (tag is None or tag in one.about.tags)]
        return [model.public(one, _parent(one, kept)) for one in wanted]

    def get(self, ref: str) -> Snapshot:
        """Return the snapshot "machine@name", or with that id, or whose id alone begins so. Raises NotFound."""
        return shown(self._context, verbs.named(self._context, ref))

    def remove(self, ref: str) -> None:
        """Remove it. What machines still need of it goes with the last of them. Raises NotFound, StorageError."""
        kept = verbs.named(self._context, ref)
        if not keeping.drop(self._context, kept.id):
            table.update(self._context.records, kept.id, kind=Kind.LEFT, ref=None)
            keeping.release(self._context, [kept.id])  # the last of them may have gone meanwhile
        self._context.records.note("snapshot-removed", kept.ref or "")


def shown(context: Context, kept: Kept) -> Snapshot:
    """Return a snapshot as a caller sees it."""
    found = table.get(context.records, kept.parent) if kept.parent else None
    return model.public(kept, _parent(kept, {kept.parent: found} if found else {}))


def _parent(kept: Kept, known: dict[str, Kept]) -> str:
    found = known.get(kept.parent)
    return found.ref or "" if found is not None and found.listed else ""
