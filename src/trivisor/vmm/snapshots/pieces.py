"""Packs: pieces of files, each once, compressed some at a time.

    magic, frames, index, trailer

A piece is a page of a file (or more, in large ones), known by its digest. A frame is up to 64 of them, compressed as one; the index says
what each piece's digest and length are and where the frames begin; the trailer where the index does. What reads a pack is given the digest
of its index and checks it, and each piece against that: so a byte that changed anywhere is found by whoever needs it, and nobody else.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard

from trivisor.core.errors import StorageError

PAGE = 4096
MOST = 65536
"""Bytes of a piece."""
_IN_FRAME = 1 << 18
_LEVEL = 1
_AT_ONCE = 2
_QUEUED = 16
_CACHED = 64
_MAGIC = b"TRVPACK1"
_TRAILER = struct.Struct("<QQ8s")
_FRAME = struct.Struct("<QIII")
"""Where it begins, its length, its first piece, how many."""
DIGEST = 20
MAX_INDEX = 1 << 30


def digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


class Writer:
    """A new pack at `path`. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._crew = ThreadPoolExecutor(_AT_ONCE)
        # By one thread, one after the other: who adopts the pack into a store need not read all of it again.
        self._adder = ThreadPoolExecutor(1)
        self._sum = hashlib.sha256()
        self._adding: deque[Future[None]] = deque()
        self._put(_MAGIC)
        self._jobs: deque[tuple[int, int, Future[bytes]]] = deque()
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._frames: list[tuple[int, int, int, int]] = []
        self._digests = bytearray()
        self._sizes = array("H")

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, data: bytes, known: bytes) -> int:
        """Take a piece, of at most MOST bytes, with its digest; return its number."""
        self._digests += known
        self._sizes.append(len(data) - 1)
        self._waiting.append(data)
        self._bytes += len(data)
        if self._bytes >= _IN_FRAME:
            self._flush()
        return len(self._sizes) - 1

    def close(self) -> str:
        """Write the rest, and return the digest of the index."""
        self._flush()
        while self._jobs:
            self._write()
        index = _index(self._frames, bytes(self._digests), self._sizes)
        at = self._file.tell()
        self._put(index)
        self._put(_TRAILER.pack(at, len(index), _MAGIC))
        return digest(index).hex()

    @property
    def whole(self) -> str:
        """The digest of the file, as a store names it, once it is closed."""
        while self._adding:
            self._adding.popleft().result()
        return f"sha256:{self._sum.hexdigest()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._crew.shutdown(cancel_futures=True)
        self._adder.shutdown(cancel_futures=True)
        self._file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        data, count = b"".join(self._waiting), len(self._waiting)
        # A compressor is of one thread.
        self._jobs.append(
            (len(self._sizes) - count, count, self._crew.submit(lambda: zstandard.ZstdCompressor(level=_LEVEL).compress(data)))
        )
        self._waiting, self._bytes = [], 0
        if len(self._jobs) > _QUEUED:
            self._write()

    def _write(self) -> None:
        first, count, job = self._jobs.popleft()
        packed = job.result()
        self._frames.append((self._file.tell(), len(packed), first, count))
        self._put(packed)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._adding.append(self._adder.submit(self._sum.update, data))
        if len(self._adding) > _QUEUED:
            self._adding.popleft().result()


class Reader:
    """A pack that is there. Raises StorageError where it is not what it was."""

    def __init__(self, path: Path, index: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}", hint=HINT) from error
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        try:
            self._read(index)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.sizes)

    def piece(self, number: int) -> bytes:
        """Return one, as it was."""
        if not 0 <= number < len(self.sizes):
            raise self._damaged()
        frame = self._frame_of[number]
        at, length, first, count = self._frames[frame]
        data = self._cache.get(frame)
        if data is None:
            want = sum(self.sizes[first : first + count]) + count
            try:
                data = zstandard.ZstdDecompressor().decompress(os.pread(self._fd, length, at), max_output_size=want)
            except (zstandard.ZstdError, OSError) as error:
                raise self._damaged() from error
            if len(data) != want:
                raise self._damaged()
            self._cache[frame] = data
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        start = self._starts[number]
        piece = data[start : start + self.sizes[number] + 1]
        if digest(piece) != self.digest(number):
            raise self._damaged()
        return piece

    def digest(self, number: int) -> bytes:
        return self.digests[number * DIGEST : (number + 1) * DIGEST]

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self, wanted: str) -> None:
        size = os.fstat(self._fd).st_size
        trailer = os.pread(self._fd, _TRAILER.size, max(0, size - _TRAILER.size))
        if len(trailer) != _TRAILER.size:
            raise self._damaged()
        at, length, magic = _TRAILER.unpack(trailer)
        if magic != _MAGIC or length > MAX_INDEX or at + length + _TRAILER.size != size:
            raise self._damaged()
        index = os.pread(self._fd, length, at)
        if digest(index).hex() != wanted:
            raise self._damaged()
        frames, pieces = struct.unpack_from("<II", index)
        ends = 8 + frames * _FRAME.size
        if len(index) != ends + pieces * (DIGEST + 2):
            raise self._damaged()
        self._frames = [_FRAME.unpack_from(index, 8 + number * _FRAME.size) for number in range(frames)]
        self.digests = index[ends : ends + pieces * DIGEST]
        self.sizes = array("H")
        self.sizes.frombytes(index[ends + pieces * DIGEST :])
        self._frame_of, self._starts = array("I"), array("I")
        for number, (begin, packed, first, count) in enumerate(self._frames):
            if first != len(self._starts) or first + count > pieces or begin + packed > at or count > _IN_FRAME:
                raise self._damaged()
            start = 0
            for one in range(first, first + count):
                self._frame_of.append(number)
                self._starts.append(start)
                start += self.sizes[one] + 1
            if start > _IN_FRAME + MOST:
                raise self._damaged()
        if len(self._starts) != pieces:
            raise self._damaged()

    def _damaged(self) -> StorageError:
        return StorageError(f"{self.path} is damaged", hint=HINT)


HINT = "`trivisor snapshots check` says which snapshots need it; remove them, or bring their files back"


def _index(frames: Iterable[tuple[int, int, int, int]], digests: bytes, sizes: array[int]) -> bytes:
    packed = [_FRAME.pack(*frame) for frame in frames]
    return struct.pack("<II", len(packed), len(sizes)) + b"".join(packed) + digests + sizes.tobytes()
