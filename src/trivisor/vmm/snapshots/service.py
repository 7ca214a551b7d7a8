"""`vmm.snapshots`: the snapshots of a home."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trivisor.core.units import parse_duration, parse_size
from trivisor.vmm.context import Context
from trivisor.vmm.snapshots import carry, diff, keeping, model, table, upkeep, verbs
from trivisor.vmm.snapshots.diff import Difference
from trivisor.vmm.snapshots.model import Kept, Kind, Snapshot
from trivisor.vmm.snapshots.tree import Branch, seen, tree
from trivisor.vmm.snapshots.upkeep import Pruned, Total


class Snapshots:
    """The snapshots of one home, of machines that are there and that are gone."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def list(self, machine: str | None = None, *, tag: str | None = None) -> builtins.list[Snapshot]:
        """Return those of the machine with that name or id, or of all, the oldest first; with `tag` those that have it."""
        rows = {one.id: one for one in table.rows(self._context.records)}
        found = [one for one in rows.values() if one.listed and not keeping.expired(one)]
        wanted = [one for one in found if machine in (None, one.name, one.machine) and (tag is None or tag in one.about.tags)]
        return [_public(one, rows) for one in wanted]

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

    def change(
        self,
        ref: str,
        *,
        note: str | None = None,
        tags: Iterable[str] | None = None,
        keep: bool | None = None,
        ttl: float | str | None = None,
    ) -> Snapshot:
        """Give it another note, other tags, another time from now on until it is removed (0: none). Raises NotFound, InvalidSpec."""
        kept = verbs.named(self._context, ref)
        about = keeping.about(kept, note=kept.about.note if note is None else note, tags=kept.about.tags if tags is None else tuple(tags))
        model.check_words(about.note, about.tags)
        more: dict[str, Any] = {} if keep is None else {"keep": keep}
        if ttl is not None:
            more["expires"] = None if ttl == 0 else keeping.until(parse_duration(ttl, "ttl"))
        changed = table.update(self._context.records, kept.id, about=about, **more)
        return shown(self._context, changed or kept)

    def tree(self) -> builtins.list[Branch]:
        """Return the snapshots that came after no other, each with those that came after it and the machines that stand there."""
        return [*tree(self._context)]

    def diff(self, first: str, second: str) -> Difference:
        """Say which files the second has, lacks, or has otherwise, with their sizes, and how many pages of memory are not the same.

        Takes about as long as a commit of both machines. Raises NotFound, InvalidSpec unless both are of one image and wall,
        UnsupportedByWall, StorageError, ImageError, EngineError, GuestError, HostLacks.
        """
        return diff.diff(self._context, verbs.named(self._context, first), verbs.named(self._context, second))

    def du(self) -> Total:
        """Weigh them: what each has alone, what it shares. Raises StorageError."""
        return upkeep.du(self._context)

    def check(self) -> builtins.list[str]:
        """Read every byte that is kept; return what is damaged, in words, each beginning with a snapshot's ref. Takes as long as the disk
        does. A damaged folder that can be laid out anew is taken away."""
        return upkeep.check(self._context)

    def prune(self, *, max_bytes: int | str | None = None, everything: bool = False, dry_run: bool = False) -> Pruned:
        """Remove what no machine needs until all take `max_bytes` (the budget, if none is given) or less, the least lately used first:
        folders that can be laid out again, then snapshots without `keep`. With `everything` all of that. Raises InvalidSpec,
        StorageError."""
        limit = None if max_bytes is None else parse_size(max_bytes, "max_bytes")
        return upkeep.prune(self._context, max_bytes=limit, everything=everything, dry_run=dry_run)

    @property
    def max_bytes(self) -> int | None:
        """What all of the home may take on the disk; whenever one comes, others are pruned to that. None: there is no bound."""
        return upkeep.budget(self._context)

    @max_bytes.setter
    def max_bytes(self, size: int | str | None) -> None:
        upkeep.set_budget(self._context, None if size is None else parse_size(size, "max_bytes"))
        upkeep.hold(self._context)

    def export(self, ref: str, target: str | os.PathLike[str]) -> None:
        """Write it into one new file. Its image is not in it. Raises NotFound, AlreadyExists, StorageError."""
        carry.write(self._context, verbs.named(self._context, ref), Path(target))

    def import_(self, source: str | os.PathLike[str], ref: str | None = None) -> Snapshot:
        """Take one from a file that `export` wrote here or elsewhere, under the name that it had or as `ref` ("web@ready").

        What this host cannot run, or is damaged, is refused before anything is there: HostLacks, NotFound (its image), UnsupportedByWall,
        StorageError. Volumes, published ports and named networks of its machine are left out. Raises AlreadyExists, InvalidSpec besides.
        """
        kept = carry.read(self._context, Path(source), ref)
        self._context.records.note("snapshot-imported", f"{kept.ref} from {source}")
        upkeep.hold(self._context, kept.id)
        return shown(self._context, kept)


def shown(context: Context, kept: Kept) -> Snapshot:
    """Return a snapshot as a caller sees it."""
    return _public(kept, {one.id: one for one in table.rows(context.records)})


def _public(kept: Kept, rows: dict[str, Kept]) -> Snapshot:
    parent = seen(kept.parent, rows)
    return model.public(kept, rows[parent].ref or "" if parent else "")
