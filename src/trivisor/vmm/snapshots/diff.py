"""What lies between two snapshots of one image: files, and pages of memory.

The writable layer of each becomes a layer of an image, as a commit makes it (images/upper.py): so whiteouts, opaque folders and what a
guest's disk holds mean the same whatever wall wrote them. What one layer says nothing of is as the image has it. Memory is compared by
the pieces that it is kept in.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from trivisor.core import process
from trivisor.core.errors import InvalidSpec, UnsupportedByWall
from trivisor.core.files import sha256
from trivisor.core.paths import MachineDir
from trivisor.core.state import State
from trivisor.images.tree import OPAQUE, WHITEOUT
from trivisor.images.view import StackView
from trivisor.launch import ids
from trivisor.store.faults import translated
from trivisor.vmm import changes
from trivisor.vmm.changes import Reader
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import packed
from trivisor.vmm.snapshots.model import Kept
from trivisor.vmm.snapshots.pieces import PAGE
from trivisor.vmm.snapshots.pieces import Reader as PackReader

_FILES = ("layer", "layer.tar", "layer.ext4", "disk.qcow2")
"""Where engines put the writable layer in what they freeze."""
_BESIDE = ("frozen.json", "tvinit", "state")
_KINDS = {tarfile.REGTYPE: "f", tarfile.AREGTYPE: "f", tarfile.DIRTYPE: "d", tarfile.SYMTYPE: "l", tarfile.FIFOTYPE: "p"}
_TIMEOUT = 1800.0


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One file that is not in both what it is in one."""

    path: str
    how: Literal["added", "changed", "removed"]
    kind: str
    """f, d, l, p: a file, a folder, a link, a pipe."""
    before: int | None
    """Its size in bytes in the first snapshot, None if it is not there."""
    after: int | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What the second of two snapshots has that the first has not, and the other way round."""

    first: str
    second: str
    files: tuple[Change, ...]
    pages: int | None
    """Of 4096 bytes, of the machine's memory as it is kept, that are not the same in both; None unless both have memory."""


@dataclass(frozen=True)
class _State:
    """A file as one side has it. `content` is its digest, or where it can be read."""

    kind: str
    size: int
    mode: int
    owner: tuple[int, int]
    target: str
    content: str | Path = ""


def diff(context: Context, one: Kept, two: Kept) -> Difference:
    """Compare two snapshots. Raises InvalidSpec, UnsupportedByWall, StorageError, ImageError, EngineError, GuestError, HostLacks."""
    if (one.digest, one.spec.wall) != (two.digest, two.spec.wall):
        hint = "compare snapshots of machines of one image behind one wall"
        raise InvalidSpec(f"{one.ref} and {two.ref} are of different images or walls", hint=hint)
    with packed.store(context).workspace() as work, translated(work.path):
        sides = []
        lowers = context.images.lowers(one.digest, lambda _: None)
        image = StackView(lowers)
        for name, kept in (("one", one), ("two", two)):
            place = work.path / name
            place.mkdir()
            sides.append(_Side(_layer(context, kept, lowers, place), image))
        files = tuple(_changes(*sides))
    pages = _pages(context, one, two) if one.about.memory and two.about.memory else None
    return Difference(first=one.ref or one.id, second=two.ref or two.id, files=files, pages=pages)


class _Side:
    """The files of one snapshot: what its layer says, over the image."""

    def __init__(self, layer: Path, image: StackView) -> None:
        self._image = image
        self.own: dict[str, _State] = {}
        self._gone: set[str] = set()
        self._opaque: set[str] = set()
        with tarfile.open(layer, "r:*") as archive:
            for member in archive:
                self._take(archive, member)

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = member.name.strip("/").removeprefix("./")
        folder, _, name = path.rpartition("/")
        if name == OPAQUE:
            self._opaque.add(folder)
        elif name.startswith(WHITEOUT):
            self._gone.add(f"{folder}/{name.removeprefix(WHITEOUT)}".lstrip("/"))
        elif member.islnk() and (first := self.own.get(member.linkname.strip("/").removeprefix("./"))):
            self.own[path] = first
        elif path and member.type in _KINDS:
            self.own[path] = _State(
                _KINDS[member.type],
                member.size if member.isreg() else 0,
                member.mode,
                (member.uid, member.gid),
                member.linkname,
                _hash(archive, member) if member.isreg() else "",
            )

    def names(self) -> Iterator[str]:
        """Yield the paths that it says something of."""
        yield from self.own
        yield from self._gone
        for folder in self._opaque:
            node = self._image.at(folder)
            if node is not None:
                yield from (f"{folder}/{name}".lstrip("/") for name in self._image.names(node))

    def at(self, path: str) -> _State | None:
        if path in self.own:
            return self.own[path]
        above = path
        while above:
            if above in self._gone:
                return None
            above = above.rpartition("/")[0]
            if above in self._opaque or (above in self.own and self.own[above].kind != "d"):
                return None
        node = self._image.at(path)
        if node is None:
            return None
        return _State(node.kind, node.size, node.mode, (node.uid, node.gid), node.target, node.place)


def _changes(one: _Side, two: _Side) -> Iterator[Change]:
    for path in sorted({*one.names(), *two.names()}):
        before, after = one.at(path), two.at(path)
        if _same(before, after):
            continue
        found = after or before
        assert found is not None
        how: Literal["added", "changed", "removed"] = "added" if before is None else "removed" if after is None else "changed"
        yield Change(path=path, how=how, kind=found.kind, before=_size(before), after=_size(after))


def _size(state: _State | None) -> int | None:
    return None if state is None else state.size


def _same(one: _State | None, two: _State | None) -> bool:
    if one is None or two is None:
        return one is two
    if replace(one, content="") != replace(two, content=""):
        return False
    return one.kind != "f" or _content(one) == _content(two)


def _content(state: _State) -> str:
    if isinstance(state.content, str):
        return state.content
    return sha256(state.content)


def _hash(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    source = archive.extractfile(member)
    if source is None:
        return ""
    found = hashlib.sha256()
    while data := source.read(1 << 20):
        found.update(data)
    return found.hexdigest()


def _layer(context: Context, kept: Kept, lowers: Sequence[Path], work: Path) -> Path:
    """Write what a snapshot changed of its image as a layer into the folder `work`; return it."""
    plain, target = packed.ready(context, kept), work / "layer"
    row = Row(id="diff", name=kept.spec.name, slot=0, spec=kept.spec, digest=kept.digest, state=State.STOPPED, created=kept.created)
    box = replace(context.box(row), dir=MachineDir(plain))
    engine = context.engine(kept.spec.wall, kept.name)
    if (plain / "disk.qcow2").exists() and isinstance(engine, Reader):
        return changes.read(engine, box, lambda: lowers, target).path
    folder = plain / "layer"
    if (plain / "layer.tar").exists():
        # A tar of what overlayfs keeps, its marks and whiteouts, as root of a user namespace may make them.
        tree = work / "tree"
        tree.mkdir()
        words = ["--extract", "--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*", "--directory", str(tree)]
        ids.run_as_root([process.find("tar", "tar"), *words, "--file", str(plain / "layer.tar")], _TIMEOUT)
        folder = tree / "root" / "upper"
    if not folder.is_dir():
        raise UnsupportedByWall("compare files on a disk of their own size", kept.spec.wall, ("vm",), machine=kept.name)
    return changes.pack_folder(folder, lowers, target).path


def _pages(context: Context, one: Kept, two: Kept) -> int:
    """Count the pages of memory that are not the same."""
    sides = [dict(_digests(context, kept)) for kept in (one, two)]
    return sum(sides[0].get(place) != sides[1].get(place) for place in {*sides[0], *sides[1]})


def _digests(context: Context, kept: Kept) -> Iterator[tuple[tuple[bytes, int], bytes]]:
    """Yield the digest of each page of memory that is not zero, by file and number."""
    listed = packed.manifest(context, kept)
    readers = [PackReader(packed.store(context).locate(pack.digest), pack.index) for pack in listed.packs]
    try:
        for entry in listed.entries:
            if entry.path.split(b"/")[0].decode("utf-8", "replace") in (*_FILES, *_BESIDE):
                continue
            for at, which, first, count in entry.runs:
                for step in range(count):
                    start = (at + step) * entry.piece
                    yield (entry.path, start // PAGE), readers[which].digest(first + step)
    finally:
        for reader in readers:
            reader.close()
