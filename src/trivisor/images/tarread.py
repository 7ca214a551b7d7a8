"""Tar archives as a stream of entries: v7, ustar, pax and GNU, with the sparse files of both (tar(5)).

Why not tarfile: it reads an extension header of any size into memory, and in the versions of Debian 12
its header patterns take quadratic time on hostile ones. Here every number is checked before it is used,
and an archive must have its end marker: one that was cut between two entries looks whole otherwise.
Global pax headers are read and not applied (git and others keep comments in them).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from trivisor.core.errors import ImageError
from trivisor.images.limits import MAX_PATH, MAX_TARGET, MAX_XATTR, Limits
from trivisor.images.stream import Stream, exactly, truncated

BLOCK = 512
KINDS = {"0": "f", "\0": "f", "7": "f", "S": "f", "1": "h", "2": "l", "3": "c", "4": "b", "5": "d", "D": "d", "6": "p"}
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_XATTR = "SCHILY.xattr."
_XATTR64 = "LIBARCHIVE.xattr."
Map = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Entry:
    """One member. `kind`: f file, d folder, l symbolic link, h hard link, p FIFO, c and b devices."""

    name: str
    kind: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    """Of the file as it is read, holes included."""
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    position: int = 0
    """Where its data begins in the (unpacked) stream."""
    stored: int = 0
    sparse: Map | None = None
    """(offset, length) of the data that is stored, in order; the rest are holes."""


@dataclass(slots=True)
class Meter:
    """What has been read, of one archive or of all layers of an image."""

    count: int = 0
    total: int = 0
    metadata: int = 0


class TarReader:
    """Reads entries until the end marker. After each, the stream stands behind the entry's data, if nobody has read that."""

    def __init__(self, stream: Stream, limits: Limits, meter: Meter | None = None) -> None:
        self._stream = stream
        self._limits = limits
        self._meter = meter or Meter()

    def __iter__(self) -> Iterator[Entry]:
        meter = self._meter
        while (entry := self._next()) is not None:
            meter.count += 1
            meter.total += max(entry.size, entry.stored)
            meter.metadata += len(entry.name) + len(entry.target) + sum(map(len, entry.xattrs.values())) + 128 * len(entry.sparse or ())
            if meter.metadata > self._limits.metadata:
                raise self._bad(entry.name, f"names, attributes and maps are over the limit of {self._limits.metadata} bytes")
            if meter.count > self._limits.entries:
                raise self._bad(entry.name, f"the image has over {self._limits.entries} entries")
            if meter.total > self._limits.total:
                raise self._bad(entry.name, f"the image is larger than the limit of {self._limits.total} bytes")
            end = entry.position + entry.stored + -entry.stored % BLOCK
            yield entry
            self._stream.skip(end - self._stream.position)

    def _bad(self, name: str, why: str) -> ImageError:
        where = f"{self._stream.name}: {name[:200]!r}" if name else self._stream.name
        return ImageError(f"{where}: {why}")

    def _next(self) -> Entry | None:
        records: list[tuple[str, bytes]] = []
        long: dict[str, str] = {}
        extensions = 0
        while True:
            header = self._header()
            if header is None:
                if records or long:
                    raise self._bad("", "an extension header belongs to no entry")
                return None
            kind = chr(header[156])
            if kind not in "xXgLKV":
                return self._entry(header, kind, records, long)
            # Each counts as little as its data: without a bound an archive of them alone would go on for ever.
            extensions += 1
            if extensions > 8:
                raise self._bad("", "too many extension headers in a row")
            data = self._extension(header)
            if kind in "xX":
                records = self._records(data)
            elif kind in "LK":
                long[kind] = _text(data.partition(b"\0")[0])

    def _header(self) -> bytes | None:
        first = self._stream.read(BLOCK)
        if not first:
            raise truncated(self._stream.name, "the list of entries (its end marker is missing)")
        header = first if len(first) == BLOCK else first + exactly(self._stream, BLOCK - len(first), "a header")
        if not any(header):
            return None
        try:
            given = self._number(header[148:156], "checksum", "")
        except ImageError:
            given = -1
        unsigned = sum(header) - sum(header[148:156]) + 8 * 32
        if given != unsigned:
            what = "not a tar archive, or a damaged one" if self._stream.position == BLOCK else "the archive is damaged"
            raise self._bad("", f"{what}: the header at byte {self._stream.position - BLOCK} has a wrong checksum")
        return header

    def _extension(self, header: bytes) -> bytes:
        size = self._number(header[124:136], "size", "")
        if size > self._limits.header:
            raise self._bad("", f"an extension header of {size} bytes is over the limit of {self._limits.header}")
        return exactly(self._stream, size + -size % BLOCK, "an extension header")[:size]

    def _records(self, data: bytes) -> list[tuple[str, bytes]]:
        """pax(1): "LENGTH KEY=VALUE\\n", the length counting itself."""
        records = []
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + 10)
            digits = data[at:space] if space > 0 else b""
            length = int(digits) if digits.isdigit() else 0
            end = at + length
            equals = data.find(b"=", space, end)
            if equals < 0 or end > len(data) or data[end - 1] != 0x0A:
                raise self._bad("", "a pax header is malformed")
            records.append((_text(data[space + 1 : equals]), data[equals + 1 : end - 1]))
            at = end
        return records

    def _number(self, raw: bytes, what: str, name: str) -> int:
        if raw[0] & 0x80:  # GNU: base 256, two's complement
            value = int.from_bytes(raw, "big", signed=False) & ((1 << (8 * len(raw) - 1)) - 1)
            if raw[0] & 0x40 or value >= 1 << 63:
                raise self._bad(name, f"its {what} is negative or too large")
            return value
        match = _OCTAL.fullmatch(raw.partition(b"\0")[0] if raw[0] else raw)
        if match is None:
            raise self._bad(name, f"its {what} is not a number")
        return int(match[1] or b"0", 8)

    def _entry(self, header: bytes, kind: str, records: list[tuple[str, bytes]], long: dict[str, str]) -> Entry:
        pax = dict(records)
        name = _text(header[0:100].partition(b"\0")[0])
        if header[257:263] == b"ustar\0" and header[345]:
            name = _text(header[345:500].partition(b"\0")[0]) + "/" + name
        name = long.get("L", name)
        name = _pax_text(pax, "GNU.sparse.name", _pax_text(pax, "path", name))
        if kind not in KINDS:
            raise self._bad(name, f"entries of type {kind!r} are not supported")
        entry = Entry(name, KINDS[kind])
        if entry.kind == "f" and name.endswith("/"):
            entry.kind = "d"  # as v7 wrote folders
        entry.mode = self._number(header[100:108], "mode", name) & 0o7777
        entry.uid = self._field(header[108:116], "uid", pax, name)
        entry.gid = self._field(header[116:124], "gid", pax, name)
        entry.mtime = min(self._mtime(header, pax, name), 0xFFFFFFFF)
        entry.target = _pax_text(pax, "linkpath", long.get("K", _text(header[157:257].partition(b"\0")[0])))
        self._bounds(entry)
        if entry.kind in "cb":
            entry.device = (self._number(header[329:337], "device", name), self._number(header[337:345], "device", name))
        # A hard link's size field repeats the file's in some archives; no data follows (as GNU tar and Go read it).
        size = self._field(header[124:136], "size", pax, name)
        entry.stored = size if kind in "0\x007SD" else 0
        entry.size = entry.stored if entry.kind == "f" else 0
        entry.xattrs = self._xattrs(pax, name)
        self._sparse(entry, header, kind, records, pax)
        return entry

    def _bounds(self, entry: Entry) -> None:
        if "\0" in entry.name or "\0" in entry.target:
            raise self._bad(entry.name, "a name holds a NUL")
        if len(entry.name) > MAX_PATH or len(entry.target) > MAX_TARGET:
            raise self._bad(entry.name, f"a name is longer than {MAX_PATH} bytes")
        if max(entry.uid, entry.gid) >= 0xFFFFFFFF:
            raise self._bad(entry.name, "its owner is not a user id")

    def _field(self, raw: bytes, what: str, pax: dict[str, bytes], name: str) -> int:
        if what not in pax:
            return self._number(raw, what, name)
        if not pax[what].isdigit() or len(pax[what]) > 19:
            raise self._bad(name, f"its {what} is not a number")
        return int(pax[what])

    def _mtime(self, header: bytes, pax: dict[str, bytes], name: str) -> int:
        if "mtime" in pax:
            match = re.fullmatch(rb"(-?)(\d{1,18})(\.\d*)?", pax["mtime"])
            if match is None:
                raise self._bad(name, "its mtime is not a number")
            return 0 if match[1] else int(match[2])
        if header[136] & 0xC0 == 0xC0:
            return 0  # before 1970: squashfs has no such times
        return self._number(header[136:148], "mtime", name)

    def _xattrs(self, pax: dict[str, bytes], name: str) -> dict[str, bytes]:
        xattrs = {}
        for key, value in pax.items():
            data = value
            if key.startswith(_XATTR64):
                try:
                    data = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
                except binascii.Error:
                    raise self._bad(name, f"its attribute {key[:60]!r} is malformed") from None
            elif not key.startswith(_XATTR):
                continue
            key = key.partition("xattr.")[2]
            if not key or len(key) > 255 or "\0" in key or len(data) > MAX_XATTR:
                raise self._bad(name, f"its attribute {key[:60]!r} is too long")
            xattrs[key] = data
        return xattrs

    # Sparse files (tar manual, "Storing Sparse Files")

    def _sparse(self, entry: Entry, header: bytes, kind: str, records: list[tuple[str, bytes]], pax: dict[str, bytes]) -> None:
        numbers: list[int] | None = None
        if kind == "S":
            entry.size = self._number(header[483:495], "size", entry.name)
            numbers = self._old_map(header, entry.name)
        elif "GNU.sparse.map" in pax:
            text = pax["GNU.sparse.map"]
            numbers = self._numbers(text.split(b",") if text else [], entry.name)
        elif "GNU.sparse.numblocks" in pax:
            given = [value for key, value in records if key in ("GNU.sparse.offset", "GNU.sparse.numbytes")]
            numbers = self._numbers(given, entry.name)
        real = pax.get("GNU.sparse.realsize", pax.get("GNU.sparse.size"))
        if real is not None:
            (entry.size,) = self._numbers([real], entry.name)
        entry.position = self._stream.position
        if pax.get("GNU.sparse.major") == b"1":
            numbers = self._data_map(entry)
        if numbers is not None:
            entry.sparse = self._checked(entry, numbers)

    def _old_map(self, header: bytes, name: str) -> list[int]:
        numbers: list[int] = []
        table, more = header[386:482], header[482]
        while True:
            for at in range(0, len(table), 24):
                if table[at]:
                    numbers += [self._number(table[at : at + 12], "map", name), self._number(table[at + 12 : at + 24], "map", name)]
            if not more:
                return numbers
            if len(numbers) * 12 > self._limits.header:
                raise self._bad(name, "its sparse map is too long")
            block = exactly(self._stream, BLOCK, "a sparse map")
            table, more = block[:504], block[504]

    def _data_map(self, entry: Entry) -> list[int]:
        """Version 1.0: decimal lines in front of the data, the first their count, padded to a block."""
        text = b""
        wanted = 1
        while (have := text.count(b"\n")) < wanted:
            if len(text) > self._limits.header or len(text) >= entry.stored:
                raise self._bad(entry.name, "its sparse map is malformed")
            text += exactly(self._stream, min(BLOCK, entry.stored - len(text)), "a sparse map")
            if have == 0 and b"\n" in text:
                (count,) = self._numbers([text.partition(b"\n")[0]], entry.name)
                wanted = 1 + 2 * count
        entry.position += len(text)
        entry.stored -= len(text)
        return self._numbers(text.split(b"\n")[1:wanted], entry.name)

    def _numbers(self, given: list[bytes], name: str) -> list[int]:
        if not all(value.isdigit() and len(value) < 19 for value in given):
            raise self._bad(name, "its sparse map is malformed")
        return [int(value) for value in given]

    def _checked(self, entry: Entry, numbers: list[int]) -> Map:
        pairs = tuple(zip(numbers[::2], numbers[1::2], strict=False))
        end = 0
        for offset, length in pairs:
            if offset < end or offset + length > entry.size:
                raise self._bad(entry.name, "its sparse map is malformed")
            end = offset + length
        if len(numbers) % 2 or sum(length for _, length in pairs) != entry.stored:
            raise self._bad(entry.name, "its sparse map does not match its data")
        return pairs


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _pax_text(pax: dict[str, bytes], key: str, default: str) -> str:
    return _text(pax[key]) if key in pax else default
