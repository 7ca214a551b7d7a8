"""What snapshots take, what may go, whether they are whole: `vmm.snapshots.du`, `prune`, `check`, and the budget that they have.

Bytes are those of the packs, which snapshots share, and of the plain folders, which machines run from and which are made again. A budget
prunes what was least lately used first: plain folders that no machine needs, then snapshots that none needs and nobody keeps.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from trivisor.core.errors import NotFound, StorageError
from trivisor.core.units import GIB
from trivisor.vmm.context import Context
from trivisor.vmm.snapshots import keeping, packed, table
from trivisor.vmm.snapshots.model import Kept, Kind

_SETTING = "snapshots-max-bytes"
LAID_OUT = GIB
"""Bytes of plain folders that no machine needs and that stay all the same: those last used."""


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What one snapshot takes, in bytes."""

    ref: str
    own: int
    """What would be free without it."""
    shared: int
    """In packs that other snapshots need too."""
    plain: int
    """Laid out for machines to run from: made again when it is needed. No part of `own`."""
    machines: tuple[str, ...]
    """Those that need it now."""


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """What all take together, in bytes."""

    packs: int
    plain: int
    other: int
    """Machines that are suspended, and what forks run from."""
    max_bytes: int | None
    snapshots: tuple[Use, ...]


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed, or would be."""

    snapshots: tuple[str, ...]
    plain: tuple[str, ...]
    """Of which the plain folder went alone."""
    freed: int
    """Bytes."""


def du(context: Context) -> Total:
    """Weigh all that there is."""
    rows = table.rows(context.records)
    lists = {kept.id: _packs(context, kept) for kept in rows}
    users = Counter(digest for packs in lists.values() for digest in packs)
    sizes = packed.store(context).sizes() if context.home.snapshots.exists() else {}
    uses, other = [], 0
    for kept in rows:
        plain = _size(keeping.plain(context, kept.id))
        if not kept.listed:
            other += plain
            continue
        own = sum(sizes.get(digest, 0) for digest in lists[kept.id] if users[digest] == 1)
        shared = sum(sizes.get(digest, 0) for digest in lists[kept.id] if users[digest] > 1)
        machines = tuple(table.users(context.records, kept.id))
        uses.append(Use(ref=kept.ref or "", own=own, shared=shared, plain=plain, machines=machines))
    plain = sum(use.plain for use in uses)
    return Total(packs=sum(sizes.values()), plain=plain, other=other, max_bytes=budget(context), snapshots=tuple(uses))


def check(context: Context) -> list[str]:
    """Read all that is kept, and what is laid out; return what is damaged, in words."""
    blobs = packed.store(context)
    broken = {digest: damage for digest in (blobs.sizes() if blobs.root.exists() else ()) if (damage := blobs.damage(digest))}
    said = []
    for kept in table.rows(context.records):
        if kept.maker is None and kept.about.manifest:
            with suppress(NotFound):  # removed meanwhile
                said += [f"{kept.ref or kept.id}: {what}" for what in _damage(context, kept, broken)]
    return said


def _damage(context: Context, kept: Kept, broken: Mapping[str, str]) -> list[str]:
    """Return what is wrong with one, `broken` being what is with the blobs."""
    blobs = packed.store(context)
    try:
        listed = packed.manifest(context, kept)
        gone = {one.digest: f"the blob {one.digest} is gone" for one in listed.packs if not blobs.exists(one.digest)}
        if found := [what for one in listed.packs if (what := broken.get(one.digest) or gone.get(one.digest))]:
            return found
        plain = keeping.plain(context, kept.id)
        if not plain.exists():
            return []
        with packed.locked(context, kept, "check"):
            whole = packed.whole(context, kept, listed, [blobs.locate(one.digest) for one in listed.packs], read=True)
        return [] if whole else [f"{plain} is not what was frozen" + _mended(context, kept)]
    except StorageError as error:
        return [error.message]


def prune(context: Context, *, max_bytes: int | None = None, everything: bool = False, dry_run: bool = False, but: str = "") -> Pruned:
    """Remove what may go, until all take at most `max_bytes`; of which None is the budget. With `everything` all that may go, `but` one."""
    limit = 0 if everything else budget(context) if max_bytes is None else max_bytes
    total = du(context)
    left = total.packs + total.plain + total.other
    plain, snapshots, freed = [], [], 0
    if limit is not None:
        uses = {use.ref: use for use in total.snapshots}
        for kept in _idle(context):
            if left - freed > limit and uses[kept.ref or ""].plain and (dry_run or packed.evict(context, kept)):
                plain.append(kept.ref or "")
                freed += uses[kept.ref or ""].plain
        for kept in _idle(context):
            if (
                left - freed > limit
                and not kept.keep
                and kept.id != but
                and (dry_run or keeping.drop(context, kept.id, [Kind.SNAPSHOT], mine=False))
            ):
                snapshots.append(kept.ref or "")
                freed += uses[kept.ref or ""].own
    if not dry_run:
        keeping.sweep(context)
        freed = max(0, left - _all(context))
    return Pruned(snapshots=tuple(snapshots), plain=tuple(one for one in plain if one not in snapshots), freed=freed)


def budget(context: Context) -> int | None:
    """Return what all may take, in bytes; None if there is no bound."""
    said = context.records.setting(_SETTING)
    return int(said) if said is not None else None


def set_budget(context: Context, size: int | None) -> None:
    context.records.set_setting(_SETTING, None if size is None else str(size))


def hold(context: Context, but: str = "") -> None:
    """Keep within the budget, and of what no machine needs no more laid out than is of use, after one came that stays in any case."""
    room = LAID_OUT
    for kept in reversed([*_idle(context)]):
        if keeping.plain(context, kept.id).exists():
            room -= kept.about.size
            if room < 0 and kept.id != but:
                packed.evict(context, kept)
    if budget(context) is not None:
        prune(context, but=but)


def _idle(context: Context) -> Iterator[Kept]:
    """Yield the snapshots that no machine needs, the least lately used first."""
    for kept in sorted(table.rows(context.records), key=lambda one: one.used):
        if kept.listed and not table.users(context.records, kept.id):
            yield kept


def _all(context: Context) -> int:
    total = du(context)
    return total.packs + total.plain + total.other


def _packs(context: Context, kept: Kept) -> set[str]:
    """Return the blobs that a snapshot needs."""
    if not kept.about.manifest:
        return set()
    try:
        return {kept.about.manifest, *(one.digest for one in packed.manifest(context, kept).packs)}
    except (StorageError, NotFound):
        return {kept.about.manifest}


def _mended(context: Context, kept: Kept) -> str:
    """Take a plain folder that is not right away: it is laid out again when it is needed."""
    return "; removed, since it can be made again" if packed.evict(context, kept) else ""


def _size(folder: Path) -> int:
    """Return the bytes that a folder takes of its file system; a file with many names is counted by its share."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                facts = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            total += facts.st_blocks * 512 // facts.st_nlink
    return total
