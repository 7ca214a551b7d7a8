"""Address spaces, of a process on this host and behind page tables in a virtual machine, with one face for both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from trivisor.core.errors import BadAddress
from trivisor.vos.memory import local
from trivisor.vos.memory.foreign import Foreign
from trivisor.vos.memory.paging import Tables
from trivisor.vos.memory.physical import Physical


class Space(Protocol):
    """One address space of a machine that stands still."""

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes. Raises BadAddress."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data`. Raises BadAddress."""
        ...

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (address, size) of what is there for programs, in order."""
        ...

    def fill(self, address: int, buffer: memoryview) -> int:
        """Fill `buffer` from an address on; return how many bytes there were."""
        ...


class Local:
    """Of a process on this host."""

    def __init__(self, foreign: Foreign) -> None:
        self._foreign = foreign
        self.read = foreign.read
        self.write = foreign.write

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        yield from local.regions(self._foreign.pid)

    def fill(self, address: int, buffer: memoryview) -> int:
        return self._foreign.into(buffer, address)


class Mapped:
    """Behind page tables in a guest's memory."""

    def __init__(self, physical: Physical, tables: Tables) -> None:
        self._physical = physical
        self._tables = tables

    def read(self, address: int, size: int) -> bytes:
        data = bytearray(size)
        self._physical.gather(memoryview(data), list(self._tables.spans(address, size)))
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """All of it is known to be mapped, to memory, before any of it is written."""
        spans = list(self._tables.spans(address, len(data)))
        for physical, size in spans:
            self._physical.where(physical, size)
        done = 0
        for physical, size in spans:
            self._physical.write(physical, data[done : done + size])
            done += size

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        return ((page.virtual, page.size) for page in self._tables.mapped(start, end, user=True))

    def fill(self, address: int, buffer: memoryview) -> int:
        spans: list[tuple[int, int]] = []
        size = 0
        try:
            for physical, part in self._tables.spans(address, len(buffer)):
                self._physical.where(physical, part)
                spans.append((physical, part))
                size += part
        except BadAddress:
            pass  # it ends before the first page that is not memory
        self._physical.gather(buffer[:size], spans)
        return size
