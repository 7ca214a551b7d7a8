"""What a machine wrote, as a list of files: a folder of the host, or the stream in which a guest sends its own (PROTOCOL.md, "upper").

The stream comes of a disk that a guest has written to, by way of a guest: each number, name and order in it is checked before it is used.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from trivisor.core.errors import ImageError
from trivisor.images.limits import MAX_NAME, MAX_PATH, MAX_TARGET, MAX_XATTR, Limits
from trivisor.images.stream import CHUNK, Section, exactly, truncated

_KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p"}
_PREFIXES = ("trusted.overlay.", "user.overlay.")
_HEAD = struct.Struct("<IIIqQI")
_PIECE = struct.Struct("<QQ")
_PIECES, _XATTRS = 4096, 4096


@dataclass(frozen=True)
class Stretch:
    """Where a file's data is: `length` bytes of the open file `fd` from `start` on; `sparse` says where in the file they belong."""

    fd: int
    start: int
    length: int
    sparse: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class File:
    """One file. `kind`: f, d, l, p; w a whiteout; "" what is left out."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int
    """In seconds since the epoch."""
    size: int = 0
    target: str = ""
    identity: tuple[int, int] | None = None
    """The same for the hard links of a file that has some."""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    marks: dict[str, bytes] = field(default_factory=dict)
    """overlayfs's own attributes, without the prefix that says who may set them."""
    data: Path | Stretch | None = None


class Listing(Protocol):
    """Files by path; "" is the top, which is a folder. `origin` begins every message."""

    origin: str

    def at(self, path: str) -> File:
        """Return the file at `path`, which is there."""
        ...

    def names(self, path: str) -> list[str]:
        """Return the names in the folder at `path`, sorted."""
        ...


class Folder:
    """A folder of the host. It must stand still: whoever could write to it could lead us elsewhere."""

    def __init__(self, root: Path) -> None:
        self.origin = str(root)
        self._root = root

    def at(self, path: str) -> File:
        place = self._root / path
        facts = place.lstat()
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "")
        if stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0:
            kind = "w"
        xattrs, marks = _split(_attributes(place))
        return File(
            kind,
            stat.S_IMODE(facts.st_mode),
            facts.st_uid,
            facts.st_gid,
            facts.st_mtime_ns // 10**9,
            facts.st_size if kind == "f" else 0,
            os.readlink(place) if kind == "l" else "",  # noqa: PTH115 - a Path would tidy it
            (facts.st_dev, facts.st_ino) if facts.st_nlink > 1 else None,
            xattrs,
            marks,
            place,
        )

    def names(self, path: str) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self._root / path))


class Received:
    """The files of a stream that lies in an open file, which must stay open for as long as their data is read. Raises ImageError."""

    def __init__(self, stream: Section, limits: Limits) -> None:
        self.origin = stream.name
        self._stream = stream
        self._limits = limits
        self._files: dict[str, File] = {}
        self._below: dict[str, list[str]] = {}
        self._metadata = 0
        if self._kind() == "e":
            # Nothing at all: a disk that no guest has had.
            self._files[""], self._below[""] = File("d", 0o755, 0, 0, 0), []
        else:
            stream.position = 0
            while (kind := self._kind()) != "e":
                self._record(kind)
        if stream.read(1) or "" not in self._files:
            raise self._bad("", "it is not what a guest would send")

    def at(self, path: str) -> File:
        return self._files[path]

    def names(self, path: str) -> list[str]:
        return sorted(self._below[path])

    def _record(self, kind: str) -> None:
        path = self._text(MAX_PATH)
        mode, uid, gid, mtime, inode, links = self._numbers(_HEAD)
        xattrs, marks = _split(self._attributes(path))
        size, target, data = 0, "", None
        if kind == "f":
            size, data = self._data(path)
        elif kind == "l":
            target = self._text(MAX_TARGET)
        elif kind not in ("d", "p", "w"):
            raise self._bad(path, f"there is no kind {kind!r}")
        identity = (0, inode) if links > 1 and kind == "f" else None
        self._place(path, kind)
        self._files[path] = File(kind, mode & 0o7777, uid, gid, mtime, size, target, identity, xattrs, marks, data)

    def _place(self, path: str, kind: str) -> None:
        """Enter the name in its folder, which must have come before."""
        if path in self._files or len(self._files) >= self._limits.entries:
            raise self._bad(path, "it comes twice" if path in self._files else f"it has over {self._limits.entries} entries")
        folder, _, name = path.rpartition("/")
        if path or kind != "d":
            if (
                name in ("", ".", "..")
                or path.startswith("/")
                or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME
                or folder not in self._below
            ):
                raise self._bad(path, "is no name in a folder")
            self._below[folder].append(name)
        if kind == "d":
            self._below[path] = []

    def _data(self, path: str) -> tuple[int, Stretch]:
        (size,) = self._numbers(struct.Struct("<Q"))
        (count,) = self._numbers(struct.Struct("<I"))
        if count > _PIECES:
            raise self._bad(path, "it is in too many pieces")
        self._count(16 * count)
        pieces, end = [], 0
        for _ in range(count):
            offset, length = self._numbers(_PIECE)
            if offset < end or length > size or offset > size - length:
                raise self._bad(path, "its data lies outside of it")
            pieces.append((offset, length))
            end = offset + length
        stored = sum(length for _, length in pieces)
        stretch = Stretch(self._stream.fd, self._stream.start + self._stream.position, stored, tuple(pieces))
        self._stream.skip(stored)
        return size, stretch

    def _attributes(self, path: str) -> dict[str, bytes]:
        (count,) = self._numbers(struct.Struct("<I"))
        if count > _XATTRS:
            raise self._bad(path, "it has too many attributes")
        return {self._text(MAX_NAME): self._bytes(MAX_XATTR) for _ in range(count)}

    def _kind(self) -> str:
        return chr(exactly(self._stream, 1, "a record")[0])

    def _numbers(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(exactly(self._stream, form.size, "a record"))

    def _text(self, limit: int) -> str:
        text = self._bytes(limit).decode("utf-8", "surrogateescape")
        if "\0" in text:
            raise self._bad(text, "a name holds a NUL")
        return text

    def _bytes(self, limit: int) -> bytes:
        (size,) = self._numbers(struct.Struct("<I"))
        if size > limit:
            raise self._bad("", f"a name or an attribute is longer than {limit} bytes")
        self._count(size)
        return exactly(self._stream, size, "a record") if size else b""

    def _count(self, size: int) -> None:
        self._metadata += size
        if self._metadata > self._limits.metadata:
            raise self._bad("", f"names and attributes are over the limit of {self._limits.metadata} bytes")

    def _bad(self, path: str, why: str) -> ImageError:
        return ImageError(f"{self.origin}: {path[:200]!r}: {why}")


def stored(stretch: Stretch, name: str) -> Iterator[bytes]:
    """Yield the data of `stretch`."""
    at, end = stretch.start, stretch.start + stretch.length
    while at < end:
        data = os.pread(stretch.fd, min(end - at, CHUNK), at)
        if not data:
            raise truncated(name, "the data of a file")
        at += len(data)
        yield data


def _split(xattrs: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Part overlayfs's own from the others."""
    plain = {name: value for name, value in xattrs.items() if not name.startswith(_PREFIXES)}
    marks: dict[str, bytes] = {}
    for prefix in _PREFIXES:
        marks |= {name.removeprefix(prefix): value for name, value in xattrs.items() if name.startswith(prefix)}
    return plain, marks


def _attributes(place: Path) -> dict[str, bytes]:
    try:
        names = os.listxattr(place, follow_symlinks=False)
    except OSError:
        return {}
    found = {}
    for name in names:
        try:
            found[name] = os.getxattr(place, name, follow_symlinks=False)
        except OSError:
            continue
    return found
