"""What is kept of frozen machines for good: packs and lists in a store of their own. What machines run from is made of that again.

    snapshots/packs/        blobs (store/store.py): packs, shared by snapshots, and one list for each

The plain folder is there after a snapshot was taken, and as long as machines run from it. Else it may go: it is laid out again from
the packs, each piece of which is checked as it is read. A plain folder whose files have other sizes or times than they had is read, and
laid out anew if it is not what it was.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from trivisor.core.errors import EngineError, NotFound, StorageError
from trivisor.launch import ids
from trivisor.store.faults import translated
from trivisor.store.store import Store
from trivisor.store.workspace import Workspace
from trivisor.vmm import locks, removal
from trivisor.vmm.context import Context
from trivisor.vmm.snapshots import keeping, packing, table
from trivisor.vmm.snapshots.model import About, Kept
from trivisor.vmm.snapshots.packing import Asked, Entry, Manifest, Pack

_WAIT = 600.0
_LITTLE = 32
"""A pack of which less than one piece in so many is needed is not held on to."""
_MOST_PACKS = 24


def store(context: Context) -> Store:
    return Store(context.home.snapshots / keeping.PACKS)


def keep(context: Context, kept: Kept, about: About) -> About:
    """Pack what was frozen, and return what is known of it with that. Raises StorageError."""
    blobs = store(context)
    known = _known(context, kept, blobs)
    while True:
        with blobs.workspace() as work, translated(blobs.root):
            new, entries = pack(context, kept, work, [(blobs.locate(one.digest), one) for one in known])
            if len(worth := _worth(known, entries)) < len(known):
                known = worth
                continue
            mine = [new] if new else []
            for one in mine:
                blobs.adopt(work.path / "pack", work.owner, known=one.digest)
            manifest = _manifest(entries, mine, known)
            digest = put(blobs, work, manifest, kept.id)
        # Until it was pinned, who needed a known pack may have been removed with it.
        if all(blobs.exists(one.digest) for one in manifest.packs):
            return msgspec.structs.replace(about, manifest=digest, size=held(entries))
        known = []


def _worth(known: Sequence[Pack], entries: Sequence[Entry]) -> list[Pack]:
    """Return those packs of which the files need much or nothing: one is kept whole for as long as anybody needs any of it."""
    used = Counter[int]()
    for one in entries:
        for _, which, _, count in one.runs:
            used[which] += count
    much = [number for number, one in enumerate(known, 1) if not used[number] or used[number] * _LITTLE >= one.pieces]
    if len(much) > _MOST_PACKS:
        much = sorted(sorted(much, key=lambda number: -used[number])[:_MOST_PACKS])
    return [known[number - 1] for number in much]


def put(blobs: Store, work: Workspace, manifest: Manifest, frozen: str) -> str:
    """Keep a list, and the packs that it names, for a frozen machine; return its digest."""
    path = work.path / "manifest"
    with translated(blobs.root):
        path.write_bytes(packing.encode(manifest))
    return blobs.adopt(path, keeping.pin_owner(frozen), links=[one.digest for one in manifest.packs])


def manifest(context: Context, kept: Kept) -> Manifest:
    """Return the list of what a frozen machine is. Raises StorageError if it is damaged or gone."""
    blobs, digest = store(context), kept.about.manifest
    path = blobs.locate(digest)
    if damage := blobs.damage(digest):
        raise StorageError(
            f"the snapshot {kept.ref or kept.id} is damaged: {damage}", machine=kept.name, hint="remove it, or import it again"
        )
    with translated(path):
        return packing.decode(path.read_bytes(), str(path))


def ready(context: Context, kept: Kept) -> Path:
    """Return the folder that an engine can run it from, laid out anew if it is not there or not what it was.

    Raises StorageError if what it is kept in is damaged.
    """
    plain = keeping.plain(context, kept.id)
    if not kept.about.manifest:
        if not plain.is_dir():
            raise StorageError(
                f"what {kept.name} was frozen in is gone: {plain}", machine=kept.name, hint="stop it: it starts from its disk"
            )
        return plain
    with locked(context, kept, "lay out"):
        listed = manifest(context, kept)
        paths = [store(context).locate(one.digest) for one in listed.packs]
        if whole(context, kept, listed, paths, read=False):
            return plain
        try:
            if whole(context, kept, listed, paths, read=True):
                return plain
            _lay(context, kept, listed, paths)
        except StorageError as error:
            error.message = f"the snapshot {kept.ref or kept.id} is damaged: {error.message}"
            raise
    return plain


def evict(context: Context, kept: Kept) -> bool:
    """Remove the plain folder of one that is packed, unless a machine needs it; say whether it did."""
    if not kept.about.manifest:
        return False
    with locked(context, kept, "evict"):
        if table.users(context.records, kept.id) or not keeping.plain(context, kept.id).exists():
            return False
        removal.remove_tree(keeping.plain(context, kept.id))
        return True


def held(entries: Sequence[Entry]) -> int:
    """Return the bytes of files that hold something."""
    return sum(min(count * one.piece, one.size - at * one.piece) for one in entries for at, _, _, count in one.runs)


@contextmanager
def locked(context: Context, kept: Kept, verb: str) -> Iterator[None]:
    """Have the plain folder come or go by nobody else."""
    try:
        with locks.hold(keeping.folder(context, kept.id) / "lock", verb, kept.ref or kept.id, wait=_WAIT):
            yield
    except locks.FolderGone as error:
        raise NotFound(f"the snapshot {kept.ref or kept.id} is gone", machine=kept.name, hint="it was removed meanwhile") from error


def _known(context: Context, kept: Kept, blobs: Store) -> list[Pack]:
    """Return the packs of the snapshot before, or else of the last of the same image."""
    rows = [row for row in table.rows(context.records) if row.about.manifest and row.maker is None and row.id != kept.id]
    like = [row for row in rows if row.digest == kept.digest and row.spec.wall == kept.spec.wall]
    for row in [*(row for row in rows if row.id == kept.parent), *reversed(like)][:1]:
        with suppress(StorageError):
            return [one for one in manifest(context, row).packs if blobs.exists(one.digest)]
    return []


def _manifest(entries: Sequence[Entry], mine: Sequence[Pack], others: Sequence[Pack]) -> Manifest:
    """Return the list, with those packs alone that it needs."""
    needed = sorted({which for one in entries for _, which, _, _ in one.runs})
    number = {which: at for at, which in enumerate(needed)}
    every = [*(mine or [Pack("", "")]), *others]
    runs = [[(at, number[which], first, count) for at, which, first, count in one.runs] for one in entries]
    files = [msgspec.structs.replace(one, runs=some) if some else one for one, some in zip(entries, runs, strict=True)]
    return Manifest(packing.FORMAT, [every[which] for which in needed], files)


def pack(context: Context, kept: Kept, work: Workspace, known: list[tuple[Path, Pack]]) -> tuple[Pack | None, list[Entry]]:
    """Pack the plain folder into `work`, beside packs that are known; packing.pack says more."""
    folder, target = keeping.plain(context, kept.id), work.path / "pack"
    try:
        if not _apart(context, kept):
            return packing.pack(folder, target, known)
        answer = _as_root(work, Asked("pack", str(folder), str(target), [(str(path), one) for path, one in known]))
        return msgspec.msgpack.decode(answer, type=tuple[Pack | None, list[Entry]])
    except (StorageError, EngineError):
        if not known:
            raise
        target.unlink(missing_ok=True)
        return pack(context, kept, work, [])  # a damaged pack is no reason not to make another


def whole(context: Context, kept: Kept, listed: Manifest, paths: list[Path], *, read: bool) -> bool:
    """Say whether the plain folder is what was packed, by its files' sizes and times, or with `read` by their bytes."""
    plain = keeping.plain(context, kept.id)
    if not plain.is_dir():
        return False
    if not _apart(context, kept):
        return packing.equal(plain, listed, paths) if read else packing.same(plain, listed)
    with store(context).workspace() as work, translated(work.path):
        return _asked(work, "equal" if read else "same", plain, listed, paths) == b"1"


def _apart(context: Context, kept: Kept) -> bool:
    """Whether the files are of ids that only a user namespace of ours has: who works on them is root of one."""
    return os.geteuid() != 0 and kept.spec.wall != "vm" and ids.probe(context.home.root).kind == "subids"


def _lay(context: Context, kept: Kept, listed: Manifest, packs: list[Path]) -> None:
    folder = keeping.folder(context, kept.id)
    aside, plain = folder / "laid", folder / "plain"
    removal.remove_tree(aside)
    try:
        with translated(folder):
            if _apart(context, kept):
                with store(context).workspace() as work:
                    _asked(work, "lay", aside, listed, packs)
            else:
                packing.lay(aside, listed, packs)
    except BaseException:
        removal.remove_tree(aside)
        raise
    removal.remove_tree(plain)
    with translated(folder):
        aside.rename(plain)


def _asked(work: Workspace, what: str, folder: Path, listed: Manifest, packs: list[Path]) -> bytes:
    (work.path / "manifest").write_bytes(packing.encode(listed))
    return _as_root(work, Asked(what, str(folder), "", [], str(work.path / "manifest"), [str(path) for path in packs]))


def _as_root(work: Workspace, asked: Asked) -> bytes:
    request = work.path / "request"
    with translated(request):
        request.write_bytes(msgspec.json.encode(asked))
        ids.run_as_root([sys.executable, "-m", "trivisor.vmm.snapshots.packing", str(request)], _WAIT)
        return request.with_suffix(".answer").read_bytes()
