"""Page tables, walked: of one's own making in each form that the processor knows, and of anybody's."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import BadAddress
from trivisor.vos.memory import paging
from trivisor.vos.memory.paging import Page, Tables

P, W, U, HUGE, NX = 1, 2, 4, 0x80, 1 << 63
SIZE = 64 << 12


class Physical:
    """Sixteen pages of memory, to put tables into."""

    def __init__(self, data: bytes = bytes(SIZE)) -> None:
        self.data = bytearray(data)
        self.reads = 0

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        if address + size > len(self.data):
            raise BadAddress(f"{address:#x} is not memory")
        return bytes(self.data[address : address + size])

    def put(self, table: int, index: int, entry: int) -> None:
        struct.pack_into("<Q", self.data, (table << 12) + 8 * index, entry)


def small(levels: int = 4) -> tuple[Physical, int]:
    """Tables in pages 0, 1, 2 ... that map one small page at indices 1, 2, 3 ...; return them and the address."""
    memory = Physical()
    address = 0
    for level in range(levels):
        memory.put(level, level + 1, (level + 1 if level < levels - 1 else 9) << 12 | P | W | U)
        address |= (level + 1) << 12 + 9 * (levels - 1 - level)
    memory.data[9 << 12 : (9 << 12) + 5] = b"hello"
    return memory, address


@pytest.mark.parametrize("levels", [4, 5])
def test_a_small_page(levels: int) -> None:
    memory, address = small(levels)
    tables = Tables(memory.read, 0, levels)
    assert tables.page(address + 7) == Page(address, 9 << 12, 4096, True, True, True)
    assert tables.read(address, 5) == b"hello"
    assert list(tables.mapped()) == [tables.page(address)]
    with pytest.raises(BadAddress):
        tables.page(address + 4096)
    with pytest.raises(BadAddress):
        tables.read(address + 4090, 10)


@pytest.mark.parametrize(("level", "size"), [(1, 2 << 20), (2, 1 << 30)])
def test_a_huge_page(level: int, size: int) -> None:
    memory = Physical()
    for table in range(3 - level):
        memory.put(table, 0, (table + 1) << 12 | P | W | U)
    # Bit 12 of such an entry is of its caching.
    memory.put(3 - level, 5, 3 * size | 1 << 12 | P | W | U | HUGE)
    tables = Tables(memory.read, 0)
    assert tables.page(5 * size + 12345) == Page(5 * size, 3 * size, size, True, True, True)
    assert list(tables.spans(5 * size + size - 4, 4)) == [(4 * size - 4, 4)]


def test_rights_are_those_of_all_levels() -> None:
    memory, address = small()
    memory.put(1, 2, 2 << 12 | P | U)
    memory.put(2, 3, 3 << 12 | P | W | NX)
    page = Tables(memory.read, 0).page(address)
    assert (page.writable, page.user, page.executable) == (False, False, False)
    assert list(Tables(memory.read, 0).mapped(user=True)) == []


def test_the_upper_half_and_what_no_processor_has() -> None:
    memory = Physical()
    memory.put(0, 511, 1 << 12 | P)
    memory.put(1, 511, 7 << 30 | P | HUGE)
    tables = Tables(memory.read, 0)
    assert tables.page((1 << 64) - 1).virtual == (1 << 64) - (1 << 30)
    assert [page.virtual for page in tables.mapped()] == [(1 << 64) - (1 << 30)]
    for address in (1 << 47, 1 << 64, -1, (1 << 64) - (1 << 48)):
        with pytest.raises(BadAddress, match="is not an address"):
            tables.page(address)
    memory.put(0, 1, 1 << 12 | P | HUGE)  # no processor has pages of 512 GiB
    with pytest.raises(BadAddress, match="reserved"):
        Tables(memory.read, 0).page(1 << 39)


def test_tables_that_are_their_own_end() -> None:
    memory = Physical()
    for index in range(512):
        memory.put(0, index, P | W | U)
    tables = Tables(memory.read, 0)
    assert tables.page(0).physical == 0
    with pytest.raises(BadAddress, match="no end"):
        for _ in tables.mapped(most=100):
            pass
    assert memory.reads == 1


def test_a_table_outside_of_memory_maps_nothing() -> None:
    memory, address = small()
    memory.put(0, 200, 1 << 40 | P | W | U)
    assert [page.virtual for page in Tables(memory.read, 0).mapped()] == [address]
    with pytest.raises(BadAddress, match="is not memory"):
        Tables(memory.read, 0).page(200 << 39)


ENTRY = st.one_of(st.integers(0, (1 << 64) - 1), st.builds(lambda page, bits: page << 12 | bits, st.integers(0, 15), st.integers(0, 255)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 511), ENTRY), max_size=40),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([4, 5]),
    st.integers(0, 1 << 52),
)
def test_any_tables(entries: list[tuple[int, int, int]], address: int, levels: int, root: int) -> None:
    """Whatever the tables say: a page that holds the address, or BadAddress; in as many steps as there are levels."""
    memory = Physical()
    for table, index, entry in entries:
        memory.put(table, index, entry)
    tables = Tables(memory.read, root if root % 2 else (root % 16) << 12, levels)
    try:
        page = tables.page(address)
        assert page.virtual <= address < page.virtual + page.size
        assert page.physical % page.size == 0 and page.size in (1 << 12, 1 << 21, 1 << 30)
    except BadAddress:
        pass
    assert memory.reads <= levels
    try:
        for page in tables.mapped(most=200):
            assert page.virtual % page.size == 0
    except BadAddress:
        pass
    assert memory.reads <= levels + 200


def test_a_page_that_mapped_yields_is_what_page_says() -> None:
    memory, address = small(5)
    memory.put(2, 400, 1 << 30 | P | W | U | HUGE)
    tables = Tables(memory.read, 0, 5)
    pages = list(tables.mapped())
    assert len(pages) == 2 and paging.PAGE == 4096
    for page in pages:
        assert tables.page(page.virtual + page.size - 1) == page
    assert [page.virtual for page in tables.mapped(address, address + 1)] == [address]
