"""Reading archives forward: a part of a file, plain or packed, whose every read is bounded.

Packing is told by its magic, never by a name or a media type. Unpacking is done a piece at a time, so a
bomb costs time only until a limit is met. What is damaged or ends early is ImageError.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import IO, Protocol, cast

import zstandard

from trivisor.core.errors import ImageError
from trivisor.core.units import MIB
from trivisor.images.limits import Limits

CHUNK = 256 << 10
PIECE = 1 << 20
MEMORY = 256 * MIB
"""What an xz stream may make us allocate (its header names any size up to 4 GiB)."""
WINDOW = 128 * MIB
"""The zstd window that every decoder accepts without asking (RFC 8878, 3.1.1.1.2, and zstd -19)."""
RATIO_FROM = 64 * MIB


class Stream(Protocol):
    """Bytes that are read once, forward."""

    name: str
    position: int

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        ...

    def skip(self, size: int) -> None:
        """Leave out `size` bytes. Raises ImageError if there are fewer."""
        ...


def exactly(stream: Stream, size: int, what: str) -> bytes:
    """Return `size` bytes. Raises ImageError if the stream ends before; `what` names what they are."""
    parts = []
    while size:
        part = stream.read(min(size, CHUNK))
        if not part:
            raise truncated(stream.name, what)
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def truncated(name: str, what: str) -> ImageError:
    """Return what to raise where `name` ends within `what`."""
    return ImageError(f"{name}: the archive is truncated: it ends within {what}", hint="fetch or make it again")


class Section:
    """The bytes [start, end) of an open file. Sections of one file do not disturb each other."""

    def __init__(self, fd: int, start: int, end: int, name: str) -> None:
        self.fd, self.start, self.end, self.name = fd, start, end, name
        self.position = 0

    def read(self, size: int, /) -> bytes:
        size = min(size, self.end - self.start - self.position)
        if size <= 0:
            return b""
        try:
            data = os.pread(self.fd, size, self.start + self.position)
        except OSError as error:
            raise ImageError(f"{self.name}: {error.strerror}") from error
        self.position += len(data)
        return data

    def skip(self, size: int) -> None:
        if size > self.end - self.start - self.position:
            raise truncated(self.name, "the data of a file")
        self.position += size

    def part(self, start: int, size: int, name: str) -> Section:
        """Return `size` bytes of this section, from `start`."""
        return Section(self.fd, self.start + start, self.start + start + size, name)


class Unpacked:
    """A packed section, unpacked as it is read."""

    def __init__(self, packed: Section, read: Callable[[int], bytes], limits: Limits) -> None:
        self.name = packed.name
        self.position = 0
        self._packed = packed
        self._read = read
        self._ratio = limits.ratio

    def read(self, size: int, /) -> bytes:
        try:
            data = self._read(size)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
            raise ImageError(f"{self.name}: the archive is damaged: {error}", hint="fetch or make it again") from error
        self.position += len(data)
        if self.position > RATIO_FROM and self.position > self._ratio * self._packed.position:
            raise ImageError(f"{self.name}: over {self._ratio} times larger unpacked: a bomb, not an image")
        return data

    def skip(self, size: int) -> None:
        while size:
            data = self.read(min(size, CHUNK))
            if not data:
                raise truncated(self.name, "the data of a file")
            size -= len(data)


class Hashed:
    """A stream whose digest is counted on the way. It reads in large pieces and gives small ones, which makes headers cheap."""

    def __init__(self, inner: Stream, limits: Limits, ahead: Executor | None = None) -> None:
        """With `ahead` the next piece is unpacked by another thread while this one is used; then `close` it."""
        self.name = inner.name
        self.position = 0
        self._inner = inner
        self._ahead = ahead
        self._next: Future[bytes] | None = None
        self._limit = 2 * limits.total
        self._piece = b""
        self._at = 0
        self._sha = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        if self._at == len(self._piece) and not self._more():
            return b""
        data = self._piece[self._at : self._at + size]
        self._at += len(data)
        self.position += len(data)
        return data

    def skip(self, size: int) -> None:
        while size:
            if self._at == len(self._piece) and not self._more():
                raise truncated(self.name, "the data of a file")
            step = min(size, len(self._piece) - self._at)
            self._at += step
            self.position += step
            size -= step

    def digest(self) -> str:
        """Read what is left, and return the digest of the whole."""
        while self._more():
            self.position += len(self._piece)
            if self.position > self._limit:
                raise ImageError(f"{self.name}: larger than the limit of {self._limit} bytes unpacked")
        return f"sha256:{self._sha.hexdigest()}"

    def close(self) -> None:
        """Wait until nobody reads any more."""
        if self._next is not None and not self._next.cancel():
            self._next.exception()

    def _more(self) -> bool:
        if self._ahead is None:
            self._piece = self._read()
        else:
            self._piece = self._next.result() if self._next is not None else self._read()
            self._next = self._ahead.submit(self._read) if self._piece else None
        self._at = 0
        return bool(self._piece)

    def _read(self) -> bytes:
        data = self._inner.read(PIECE)
        self._sha.update(data)
        return data


def unpack(packed: Section, limits: Limits) -> Stream:
    """Return `packed` as it is after gzip, zstd, bzip2 or xz; itself if it is none of them."""
    kind = packing(packed.part(0, packed.end - packed.start, packed.name).read(6))
    if not kind:
        return packed
    if kind == "zstd":
        decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW)
        reader = decoder.stream_reader(cast(IO[bytes], packed), read_size=CHUNK, read_across_frames=True, closefd=False)
        return Unpacked(packed, reader.read, limits)
    return Unpacked(packed, _Members(packed, kind).read, limits)


def packing(magic: bytes) -> str:
    """Return which packing begins with `magic` (six bytes), or nothing."""
    if magic[:2] == b"\x1f\x8b":
        return "gzip"
    if magic[:3] == b"BZh":
        return "bzip2"
    if magic == b"\xfd7zXZ\0":
        return "xz"
    if magic[:4] == b"\x28\xb5\x2f\xfd" or (magic[1:4] == b"\x2a\x4d\x18" and 0x50 <= magic[0] <= 0x5F):
        return "zstd"
    return ""


class _Decoder(Protocol):
    """What bz2's and lzma's decoders are, and zlib's is not."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _decoder(kind: str) -> _Decoder:
    if kind == "gzip":
        return _Gzip()
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(memlimit=MEMORY)


class _Members:
    """Packed members one after the other (RFC 1952, 2.2). What follows the last is padding and is left."""

    def __init__(self, packed: Section, kind: str) -> None:
        self._packed = packed
        self._kind = kind
        self._decoder = _decoder(kind)

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data or self._packed.read(CHUNK)
                if packing(data[:6]) != self._kind:
                    return b""
                self._decoder = _decoder(self._kind)
            elif self._decoder.needs_input:
                data = self._packed.read(CHUNK)
                if not data:
                    raise EOFError("it ends too early")
            if out := self._decoder.decompress(data, size):
                return out
