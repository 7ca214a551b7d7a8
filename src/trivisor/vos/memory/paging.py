"""x86-64 page tables, walked in a copy of somebody's memory (Intel SDM volume 3, 4.5). Pure.

The tables are a guest's: an entry may point anywhere, to itself, or out of memory. A walk takes as many steps as there are levels, and
an enumeration visits no more tables than it is told. Nothing is cached beyond one `Tables`, which is true while the machine stands still.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trivisor.core.errors import BadAddress

Read = Callable[[int, int], bytes]
"""Physical address and size, to that many bytes. Raises BadAddress."""

PAGE = 4096
_ENTRIES = 512
_PRESENT, _WRITE, _USER, _HUGE, _NX = 1, 2, 4, 1 << 7, 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000
_TABLE = struct.Struct("<512Q")
_CACHED = 1024
MAX_TABLES = 1 << 16
"""Of one enumeration: what maps 128 GiB in small pages."""


@dataclass(frozen=True)
class Page:
    """One page as the processor would map it. `size` is 4 KiB, 2 MiB or 1 GiB."""

    virtual: int
    physical: int
    size: int
    writable: bool
    user: bool
    executable: bool


class Tables:
    """One address space: the tables below `root`, the physical address of the top one (CR3), in `levels` (4 or 5) levels."""

    def __init__(self, read: Read, root: int, levels: int = 4) -> None:
        self._read = read
        self._root = root & _FRAME
        self._levels = levels
        self._known: dict[int, tuple[int, ...]] = {}

    def page(self, address: int) -> Page:
        """Return the page that holds a virtual address. Raises BadAddress where there is none."""
        self._check(address)
        table, allowed = self._root, _WRITE | _USER
        nx = 0
        for level in range(self._levels - 1, -1, -1):
            shift = 12 + 9 * level
            entry = self._entries(table)[address >> shift & _ENTRIES - 1]
            if not entry & _PRESENT:
                raise BadAddress(f"nothing is mapped at {address:#x}")
            allowed &= entry
            nx |= entry & _NX
            if level == 0 or entry & _HUGE:
                return _page(address, entry, level, allowed, nx)
            table = entry & _FRAME
        raise AssertionError("level 0 always returns")

    def spans(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (physical address, size) for each part of a range, in order. Raises BadAddress at the first part that is not mapped."""
        while size > 0:
            page = self.page(address)
            inside = address - page.virtual
            part = min(size, page.size - inside)
            yield page.physical + inside, part
            address += part
            size -= part

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes at a virtual address. Raises BadAddress."""
        return b"".join(self._read(physical, part) for physical, part in self.spans(address, size))

    def mapped(self, start: int = 0, end: int = 1 << 64, *, user: bool | None = None, most: int = MAX_TABLES) -> Iterator[Page]:
        """Yield the pages from `start` up to `end` in order; with `user` only those that programs may (or may not) use.

        Raises BadAddress after `most` tables. A table that lies outside of memory maps nothing.
        """
        left = [most]
        for page in self._below(self._root, self._levels - 1, 0, (start, end), (_WRITE | _USER, 0), left):
            if user is None or page.user == user:
                yield page

    def _below(
        self, table: int, level: int, base: int, wanted: tuple[int, int], rights: tuple[int, int], left: list[int]
    ) -> Iterator[Page]:
        left[0] -= 1
        if left[0] < 0:
            raise BadAddress("its page tables have no end", hint="give a narrower range")
        try:
            entries = self._entries(table)
        except BadAddress:
            return
        shift = 12 + 9 * level
        for index, entry in enumerate(entries):
            if not entry & _PRESENT:
                continue
            address = self._canonical(base | index << shift)
            if address >= wanted[1] or address + (1 << shift) <= wanted[0]:
                continue
            allowed, nx = rights[0] & entry, rights[1] | entry & _NX
            if level == 0 or entry & _HUGE:
                try:
                    yield _page(address, entry, level, allowed, nx)
                except BadAddress:
                    continue
            else:
                yield from self._below(entry & _FRAME, level - 1, base | index << shift, wanted, (allowed, nx), left)

    def _entries(self, table: int) -> tuple[int, ...]:
        known = self._known.get(table)
        if known is None:
            known = _TABLE.unpack(self._read(table, PAGE))
            if len(self._known) >= _CACHED:
                self._known.clear()
            self._known[table] = known
        return known

    def _canonical(self, address: int) -> int:
        top = 12 + 9 * self._levels
        return address | (1 << 64) - (1 << top) if address >> top - 1 & 1 else address

    def _check(self, address: int) -> None:
        if not 0 <= address < 1 << 64 or self._canonical(address & (1 << 12 + 9 * self._levels) - 1) != address:
            raise BadAddress(f"{address:#x} is not an address of a processor with {self._levels} levels of page tables")


def _page(address: int, entry: int, level: int, allowed: int, nx: int) -> Page:
    if level > 2:
        raise BadAddress(f"the page tables at {address:#x} have a reserved bit set")
    size = 1 << 12 + 9 * level
    # Bit 12 of a huge page's entry is of its caching, not of its address.
    physical = entry & _FRAME & -size
    return Page(address & -size, physical, size, bool(allowed & _WRITE), bool(allowed & _USER), not nx)
