"""A folder as pieces and a list, and back: what a frozen machine is kept in, and leaves its home as.

Every file of it is there with owner, rights, times, extended attributes and hard links, whatever an engine put into it; of the bytes only
what is not zero, and what no pack that is known holds. The list ("manifest") names the packs and how each file is made of their pieces.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import zstandard

from trivisor.core.errors import StorageError
from trivisor.vmm.snapshots.pieces import HINT, MOST, PAGE, Reader, Writer, digest

FORMAT = 1
MAX_MANIFEST = 1 << 30
_MOST_ENTRIES = 5_000_000
_LARGE = 2 << 30
"""Files with more data than this are cut into larger pieces."""
_READ = 1 << 20
_ZERO = bytes(MOST)
_KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p", stat.S_IFCHR: "c"}


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One file. `kind`: f, d, l, p as usual, and c, the whiteout of overlayfs."""

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int
    """Nanoseconds since the epoch."""
    size: int = 0
    target: bytes = b""
    xattrs: dict[str, bytes] = {}
    link: int = -1
    """The number of the entry that is the same file."""
    piece: int = PAGE
    runs: list[tuple[int, int, int, int]] = []
    """(number of the first piece in the file, pack, first piece in the pack, count); what lies between is a hole."""


class Pack(msgspec.Struct, frozen=True, array_like=True):
    """A pack that is needed: its digest in the store, that of its index, and how many pieces it holds."""

    digest: str
    index: str
    pieces: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """All files of a folder, and the packs that their bytes are in."""

    format: int
    packs: list[Pack]
    entries: list[Entry]


def pack(folder: Path, target: Path, known: Sequence[tuple[Path, Pack]]) -> tuple[Pack | None, list[Entry]]:
    """Write what is new of `folder` into the pack `target`, beside packs that are known.

    Return the new pack (None: there is nothing new, and no pack), and the files, to which it is number 0, and the known packs are 1 and
    so on. Raises OSError, StorageError.
    """
    with ExitStack() as stack:
        places: dict[bytes, tuple[int, int]] = {}
        for number, (path, one) in enumerate(known, 1):
            with Reader(path, one.index) as reader:
                for piece in range(len(reader)):
                    places.setdefault(reader.digest(piece), (number, piece))
        writer = stack.enter_context(Writer(target))
        entries = list(_entries(folder, _Cutter(writer, places)))
        index = writer.close()
        new = Pack(writer.whole, index, len(writer)) if len(writer) else None
    if new is None:
        target.unlink()
    return new, entries


def lay(folder: Path, manifest: Manifest, packs: Sequence[Path]) -> None:
    """Make the new folder `folder` what was packed. Raises StorageError where a pack is damaged, OSError."""
    folder.mkdir(mode=0o700)
    checked(manifest)
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(path, one.index)) for path, one in zip(packs, manifest.packs, strict=True)]
        for entry in manifest.entries:
            _make(folder, entry, manifest, readers)
        for entry in reversed(manifest.entries):
            if entry.kind == "d":
                _dress(folder / os.fsdecode(entry.path), entry)


def same(folder: Path, manifest: Manifest) -> bool:
    """Say whether a folder is, as far as its files' sizes and times tell, what was packed."""
    try:
        for entry in manifest.entries:
            facts = os.lstat(folder / os.fsdecode(entry.path))
            if _KINDS.get(stat.S_IFMT(facts.st_mode)) != entry.kind:
                return False
            if entry.kind == "f" and (facts.st_size, facts.st_mtime_ns) != (entry.size, entry.mtime):
                return False
    except OSError:
        return False
    return True


def equal(folder: Path, manifest: Manifest, packs: Sequence[Path]) -> bool:
    """Say whether the bytes of a folder's files are what was packed. Raises StorageError where a pack is damaged."""
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(path, one.index)) for path, one in zip(packs, manifest.packs, strict=True)]
        try:
            return all(_equal(folder, entry, readers) for entry in manifest.entries if entry.kind == "f" and entry.link < 0)
        except OSError:
            return False


def encode(manifest: Manifest) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(manifest))


def decode(data: bytes, origin: str) -> Manifest:
    """Return the manifest that `data`, of anybody, is. Raises StorageError."""
    try:
        if zstandard.frame_content_size(data) > MAX_MANIFEST:
            raise StorageError(f"{origin} is too large a list of files")
        manifest = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_MANIFEST), type=Manifest)
    except (msgspec.MsgspecError, zstandard.ZstdError) as error:
        raise StorageError(f"{origin} is no list of files of a snapshot: {error}", hint=HINT) from error
    if manifest.format != FORMAT:
        raise StorageError(f"{origin} is of another version of trivisor", hint="use that version")
    return manifest


def checked(manifest: Manifest) -> Manifest:
    """Return a manifest of anybody's if it leads nowhere but into its own folder. Raises StorageError."""
    folders, seen = {b""}, {b""}
    for number, entry in enumerate(manifest.entries):
        parent, _, name = entry.path.rpartition(b"/")
        wrong = (
            entry.path[:1] == b"/"
            or entry.path in seen
            or parent not in folders
            or not name
            or name in (b".", b"..")
            or b"\0" in entry.path
            or len(name) > 255
        )
        wrong = wrong or entry.kind not in _KINDS.values() or not 0 <= entry.mode <= 0o7777 or not 0 < entry.piece <= MOST
        wrong = wrong or not (0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32 and entry.size >= 0)
        wrong = wrong or not (entry.link == -1 or (0 <= entry.link < number and manifest.entries[entry.link].kind == entry.kind != "d"))
        wrong = wrong or (entry.kind == "l" and (not entry.target or b"\0" in entry.target))
        for at, which, first, count in entry.runs:
            wrong = wrong or not (0 <= which < len(manifest.packs) and at >= 0 and first >= 0 and count > 0)
            wrong = wrong or (at + count - 1) * entry.piece >= entry.size
        if wrong:
            raise StorageError(f"the list of files is not one of ours, at {entry.path[:100]!r}", hint="get the file again")
        seen.add(entry.path)
        if entry.kind == "d":
            folders.add(entry.path)
    return manifest


class _Cutter:
    """Cuts files into pieces, of which a pack takes those that nobody knows."""

    def __init__(self, writer: Writer, known: dict[bytes, tuple[int, int]]) -> None:
        self._writer = writer
        self._known = known

    def cut(self, path: str, size: int, piece: int) -> list[tuple[int, int, int, int]]:
        runs: list[list[int]] = []
        with open(path, "rb", buffering=0) as file:
            for start, end in _data(file.fileno(), size):
                at = start // piece * piece
                while at < end:
                    data = os.pread(file.fileno(), _READ, at)
                    if not data:
                        break
                    for offset in range(0, len(data), piece):
                        self._piece(data[offset : offset + piece], (at + offset) // piece, runs)
                    at += len(data)
        return [(at, which, first, count) for at, which, first, count in runs]

    def _piece(self, data: bytes, at: int, runs: list[list[int]]) -> None:
        if data == _ZERO[: len(data)]:
            return
        last = runs[-1] if runs else None
        if last is not None and at < last[0] + last[3]:
            return  # two stretches of data met in it
        known = digest(data)
        place = self._known.get(known)
        if place is None:
            place = self._known[known] = (0, self._writer.add(data, known))
        if last is not None and at == last[0] + last[3] and place == (last[1], last[2] + last[3]):
            last[3] += 1
        else:
            runs.append([at, *place, 1])


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has data."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: none from here on
            return
        end = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, end
        at = end


def _entries(folder: Path, cutter: _Cutter) -> Iterator[Entry]:
    top = len(os.fsencode(folder)) + 1
    links: dict[tuple[int, int], int] = {}
    number = 0
    todo = [str(folder)]
    while todo:
        place = todo.pop()
        for found in sorted(os.scandir(place), key=lambda one: one.name):
            facts = found.stat(follow_symlinks=False)
            kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "")
            if not kind or (kind == "c" and facts.st_rdev):
                continue  # a socket is nobody's without who listened at it
            path = os.fsencode(found.path)[top:]
            same = (facts.st_dev, facts.st_ino)
            first = links.get(same, -1) if kind != "d" and facts.st_nlink > 1 else -1
            if kind == "d":
                todo.append(found.path)
            elif first < 0:
                links[same] = number
            yield _entry(found.path, path, kind, facts, first, cutter)
            number += 1


def _entry(place: str, path: bytes, kind: str, facts: os.stat_result, first: int, cutter: _Cutter) -> Entry:
    mode, mtime = stat.S_IMODE(facts.st_mode), facts.st_mtime_ns
    if first >= 0:
        return Entry(path, kind, mode, facts.st_uid, facts.st_gid, mtime, facts.st_size if kind == "f" else 0, link=first)
    size, target, piece = 0, b"", PAGE
    runs: list[tuple[int, int, int, int]] = []
    if kind == "f":
        size = facts.st_size
        piece = MOST if facts.st_blocks * 512 > _LARGE else PAGE
        runs = cutter.cut(place, size, piece)
    elif kind == "l":
        target = os.fsencode(os.readlink(place))  # noqa: PTH115
    return Entry(path, kind, mode, facts.st_uid, facts.st_gid, mtime, size, target, _xattrs(place), -1, piece, runs)


def _xattrs(place: str) -> dict[str, bytes]:
    try:
        names = os.listxattr(place, follow_symlinks=False)
    except OSError:
        return {}
    return {name: os.getxattr(place, name, follow_symlinks=False) for name in names if not name.startswith("security.selinux")}


def _make(folder: Path, entry: Entry, manifest: Manifest, readers: Sequence[Reader]) -> None:
    place = folder / os.fsdecode(entry.path)
    if entry.link >= 0:
        os.link(folder / os.fsdecode(manifest.entries[entry.link].path), place, follow_symlinks=False)
        return
    if entry.kind == "d":
        place.mkdir(mode=0o700)
        return
    if entry.kind == "f":
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, entry.size)
            for at, data in _pieces(entry, readers):
                os.pwrite(fd, data, at)
        finally:
            os.close(fd)
    elif entry.kind == "l":
        place.symlink_to(os.fsdecode(entry.target))
    elif entry.kind == "p":
        os.mkfifo(place, 0o600)
    else:
        os.mknod(place, stat.S_IFCHR | 0o600, 0)
    _dress(place, entry)


def _pieces(entry: Entry, readers: Sequence[Reader]) -> Iterator[tuple[int, bytes]]:
    """Yield where in the file what lies, some pieces at a time."""
    for at, which, first, count in entry.runs:
        for step in range(0, count, _READ // entry.piece):
            some = range(first + step, first + min(count, step + _READ // entry.piece))
            data = b"".join(map(readers[which].piece, some))
            start = (at + step) * entry.piece
            if start + len(data) > entry.size or len(data) > len(some) * entry.piece:
                raise StorageError(f"{readers[which].path} does not fit its snapshot", hint=HINT)
            yield start, data


def _equal(folder: Path, entry: Entry, readers: Sequence[Reader]) -> bool:
    place = folder / os.fsdecode(entry.path)
    if place.lstat().st_size != entry.size:
        return False
    with place.open("rb", buffering=0) as file:
        held: set[int] = set()
        for at, data in _pieces(entry, readers):
            if os.pread(file.fileno(), len(data), at) != data:
                return False
            held.update(range(at // entry.piece, (at + len(data) + entry.piece - 1) // entry.piece))
        for start, end in _data(file.fileno(), entry.size):
            for number in range(start // entry.piece, (end + entry.piece - 1) // entry.piece):
                if number not in held and os.pread(file.fileno(), entry.piece, number * entry.piece).strip(b"\0"):
                    return False
    return True


def _dress(place: Path, entry: Entry) -> None:
    """Give a file owner, rights, attributes and times."""
    if os.geteuid() == 0:
        os.chown(place, entry.uid, entry.gid, follow_symlinks=False)
    for name, value in entry.xattrs.items():
        os.setxattr(place, name, value, follow_symlinks=False)
    if entry.kind != "l":
        place.chmod(entry.mode)
    os.utime(place, ns=(entry.mtime, entry.mtime), follow_symlinks=False)


class Asked(msgspec.Struct):
    """What another process, which is root of a user namespace, is asked for: pack, lay, same or equal."""

    what: str
    folder: str
    target: str = ""
    known: list[tuple[str, Pack]] = []
    manifest: str = ""
    packs: list[str] = []


def main(argv: Sequence[str]) -> None:
    """Do what is asked as another user: `packing REQUEST`, both sides in files."""
    request = Path(argv[0])
    asked = msgspec.json.decode(request.read_bytes(), type=Asked)
    folder, packs = Path(asked.folder), [Path(one) for one in asked.packs]
    answer = b""
    if asked.what == "pack":
        known = [(Path(path), one) for path, one in asked.known]
        answer = msgspec.msgpack.encode(pack(folder, Path(asked.target), known))
    else:
        listed = decode(Path(asked.manifest).read_bytes(), asked.manifest)
        if asked.what == "lay":
            lay(folder, listed, packs)
        else:
            answer = b"1" if (same(folder, listed) if asked.what == "same" else equal(folder, listed, packs)) else b"0"
    request.with_suffix(".answer").write_bytes(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
