"""The folders of frozen machines: made aside of what anybody sees, there while somebody needs them, gone after that.

    snapshots/ID/plain      what an engine froze, and runs machines from

A row names the folder before it is made and goes after it went; it says whole only when all that is in the folder is on the disk. So a
process that dies anywhere leaves a row whose maker is dead, or a folder that no row names, and the sweep removes both.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core import files
from trivisor.core.errors import AlreadyExists, NotFound, StorageError
from trivisor.core.process import Who
from trivisor.images.catalog import Image
from trivisor.store.store import Store
from trivisor.vmm import removal
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import table
from trivisor.vmm.snapshots.model import About, Kept, Kind

PACKS = "packs"
"""What lies beside the folders of frozen machines (packed.py)."""
UNLISTED = (Kind.SUSPEND, Kind.FORK, Kind.LEFT, Kind.GONE)


def pin_owner(frozen: str) -> str:
    """Return the name under which a frozen machine holds its image in the store."""
    return f"snapshot:{frozen}"


def folder(context: Context, frozen: str) -> Path:
    return context.home.snapshots / frozen


def plain(context: Context, frozen: str) -> Path:
    """Return where what the engine froze lies."""
    return folder(context, frozen) / "plain"


def begin(context: Context, row: Row, kind: Kind, *, ref: str | None = None, about: About, **more: Any) -> Kept:
    """Write down a frozen machine that is about to be made of `row`, and make its empty folder. `finish` or `drop` ends it.

    Raises AlreadyExists for a ref that is taken, StorageError.
    """
    now = time.time()
    kept = Kept(
        id=secrets.token_hex(6),
        kind=kind,
        machine=row.id,
        name=row.name,
        ref=ref,
        maker=Who.me(),
        created=now,
        used=now,
        parent=row.ancestor,
        digest=row.digest,
        spec=row.spec,
        about=about,
        **more,
    )
    return place(context, kept)


def place(context: Context, kept: Kept) -> Kept:
    """Write one down, make its folder, and hold its image."""
    try:
        table.add(context.records, kept)
    except AlreadyExists:
        # The name may be held by what a crash left, or by one that has expired.
        if not any(_clear(context, other) for other in table.find(context.records, kept.ref or "") if other.ref == kept.ref):
            raise
        table.add(context.records, kept)
    try:
        image = Image(kept.spec.image, kept.digest, Path(), 0, 0.0, "")
        context.images.pin(image, pin_owner(kept.id))
        plain(context, kept.id).mkdir(mode=0o700, parents=True)
    except BaseException as error:
        drop(context, kept.id)
        if isinstance(error, OSError):
            raise StorageError(f"{folder(context, kept.id)} cannot be made: {error.strerror}", hint="free space under the home") from error
        raise
    return kept


def finish(context: Context, kept: Kept, about: About, **changes: Any) -> Kept:
    """Write down that it is whole. Raises NotFound if it was taken away meanwhile, StorageError."""
    sync(folder(context, kept.id))
    sync(context.home.snapshots)
    done = table.update(context.records, kept.id, durable=True, about=about, maker=None, **changes)
    if done is None:
        raise NotFound(f"the snapshot {kept.ref or kept.id} is gone", machine=kept.name)
    return done


def settle(context: Context, frozen: str) -> bool:
    """Take one whose maker died after the machine had ended in it for whole; say whether there is anything in it."""
    kept = table.get(context.records, frozen)
    try:
        if kept is None or not any(plain(context, frozen).iterdir()):
            return False
    except OSError:
        return False
    unnamed: dict[str, Any] = {"kind": Kind.SUSPEND, "ref": None} if kept.kind is Kind.SNAPSHOT else {}
    return table.update(context.records, frozen, durable=True, maker=None, **unnamed) is not None


def drop(context: Context, frozen: str, kinds: Sequence[Kind] = tuple(Kind), *, mine: bool = True) -> bool:
    """Remove one of these kinds that no machine needs, with all it has; say whether it did. Raises StorageError."""
    kept = table.get(context.records, frozen)
    if kept is None or not table.claim(context.records, frozen, kinds, mine=mine):
        return False
    removal.remove_tree(folder(context, frozen))
    packs = Store(context.home.snapshots / PACKS)
    if kept.kind not in (Kind.FORK, Kind.SUSPEND) and packs.root.exists():
        packs.unpin(pin_owner(frozen))
        packs.collect()
    context.images.unpin(pin_owner(frozen))
    table.remove(context.records, frozen)
    return True


def release(context: Context, frozen: Iterable[str]) -> None:
    """Remove those of these that nobody sees and no machine needs any more. What cannot be removed now the sweep removes."""
    for one in frozen:
        with suppress(StorageError):
            drop(context, one, UNLISTED, mine=False)


def needed(row: Row) -> set[str]:
    """Return the frozen machines that a machine needs."""
    return {*row.base.split(), *filter(None, [row.ice])}


def sweep(context: Context) -> list[str]:
    """Remove what nobody needs: of makers that died, of machines that are gone, folders that no row names; what has expired. Say what."""
    if not context.home.snapshots.exists():
        return []
    folders = {entry.name for entry in context.home.snapshots.iterdir()} - {PACKS}
    rows = table.rows(context.records)
    stale = [(kept, what) for kept in rows if (what := _stale(kept))]
    said = [f"snapshot {kept.ref or kept.id}: removed, {what}" for kept, what in stale if _clear(context, kept)]
    for name in sorted(folders - {kept.id for kept in rows}):
        removal.remove_tree(context.home.snapshots / name)
        said.append(f"snapshot {name}: removed, nothing names it")
    return said


def until(seconds: float) -> float:
    """Return when that many seconds are over."""
    return time.time() + seconds


def expired(kept: Kept) -> bool:
    """Whether its time is up."""
    return kept.expires is not None and kept.expires <= time.time() and not kept.keep


def _stale(kept: Kept) -> str:
    """Return why one may be removed, if no machine needs it; "" if it may not."""
    if kept.maker is not None:
        return "" if kept.maker.alive() else "it was cut short"
    if kept.kind is not Kind.SNAPSHOT:
        return "no machine needs it"
    return "its time is up" if expired(kept) else ""


def _clear(context: Context, kept: Kept) -> bool:
    """Have a stale one go: at once, or with the last machine that needs it."""
    if not _stale(kept):
        return False
    if kept.listed and table.users(context.records, kept.id):
        table.update(context.records, kept.id, kind=Kind.LEFT, ref=None)
        return True
    return drop(context, kept.id, mine=False)


def about(kept: Kept, **changes: Any) -> About:
    """Return what is known of it, changed."""
    return msgspec.structs.replace(kept.about, **changes)


def sync(path: Path) -> None:
    """Have the disk hold what a folder lists. Raises StorageError."""
    try:
        files.sync(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
