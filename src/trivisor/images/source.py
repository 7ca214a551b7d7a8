"""Where the bytes of files come from while a root is written: the layers of an archive, or a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from trivisor.core.errors import ImageError
from trivisor.images.limits import Limits
from trivisor.images.stream import CHUNK, Section, Stream, truncated, unpack
from trivisor.images.tree import Content

_ZEROS = bytes(CHUNK)


class Source(Protocol):
    """Gives the stored bytes of Content. Asked in order of position, it reads forward once."""

    def stored(self, content: Content) -> Iterator[bytes]: ...


class LayerSource:
    """One tar, plain or packed. A packed one is unpacked a second time instead of being kept on disk."""

    def __init__(self, section: Section, limits: Limits) -> None:
        self._section = section
        self._limits = limits
        self._stream: Stream | None = None

    def stored(self, content: Content) -> Iterator[bytes]:
        if self._stream is None or self._stream.position > content.position:
            whole = self._section.part(0, self._section.end - self._section.start, self._section.name)
            self._stream = unpack(whole, self._limits)
        self._stream.skip(content.position - self._stream.position)
        left = content.stored
        while left:
            data = self._stream.read(min(left, CHUNK))
            if not data:
                raise truncated(self._section.name, "the data of a file")
            left -= len(data)
            yield data


class FolderSource:
    """Files of a folder on the host; Content.position is the number of the path."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def stored(self, content: Content) -> Iterator[bytes]:
        path = self.paths[content.position]
        left = content.stored
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                while left:
                    data = os.read(fd, min(left, CHUNK))
                    if not data:
                        raise ImageError(f"{path}: it shrank while it was read", hint="import a folder that nobody writes to")
                    left -= len(data)
                    yield data
            finally:
                os.close(fd)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error


def read(source: Source, content: Content) -> Iterator[bytes]:
    """Yield the file's bytes, holes filled with zeros."""
    if content.sparse is None:
        yield from source.stored(content)
        return
    stored = _Pieces(source.stored(content))
    at = 0
    for offset, length in (*content.sparse, (content.size, 0)):
        while at < offset:
            step = min(offset - at, CHUNK)
            yield _ZEROS[:step]
            at += step
        while length:
            data = stored.take(min(length, CHUNK))
            length -= len(data)
            at += len(data)
            yield data


class _Pieces:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def take(self, size: int) -> bytes:
        data = self._rest or next(self._chunks)
        self._rest = data[size:]
        return data[:size]
