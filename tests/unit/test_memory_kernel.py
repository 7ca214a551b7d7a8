"""What a kernel's image says of itself: symbols in the two orders in which kernels write them, types; whole, cut short and damaged."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.vos.memory import btf, kallsyms, kernel

BASE = 0xFFFFFFFF81000000
NAMES = [f"symbol_{number}" for number in range(1500)]


def kallsyms_image(*, after: bool, order: bool = False, relative: bool = False) -> bytes:
    """Write tables as scripts/kallsyms.c does: addresses `after` the tokens or before the names; an order by name between."""

    def aligned(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    words = [chr(code).encode() if 32 <= code < 127 else b"" for code in range(256)]
    words[128] = b"symbol_"
    names = markers = b""
    for number, name in enumerate(NAMES):
        if number % 256 == 0:
            markers += struct.pack("<I", len(names))
        code = b"T" + name.encode().replace(b"symbol_", b"\x80")
        names += bytes([len(code)]) + code if number else bytes([0x80 | 1, 1]) + b"T" + b"a" * 128
    index, tokens = b"", b""
    for word in words:
        index += struct.pack("<H", len(tokens))
        tokens += word + b"\0"
    offsets = b"".join(struct.pack("<i", number * 16 if relative else -1 - number * 16) for number in range(len(NAMES)))
    where = aligned(offsets) + struct.pack("<Q", BASE)
    listed = aligned(struct.pack("<I", len(NAMES))) + aligned(names) + aligned(markers)
    if order:
        listed += aligned(bytes(3 * len(NAMES)))
    coded = aligned(tokens) + aligned(index)
    return b"\x90" * 4096 + (listed + coded + where if after else where + listed + coded) + b"\x90" * 4096


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_symbols_in_each_form(after: bool, order: bool, relative: bool) -> None:
    found = kallsyms.read(kallsyms_image(after=after, order=order, relative=relative))
    assert found == {"a" * 128: BASE} | {name: BASE + 16 * number for number, name in enumerate(NAMES) if number}


def test_no_symbols() -> None:
    for data in (b"", bytes(10000), b"".join(b"%d\0" % digit for digit in range(10)) * 3, kallsyms_image(after=True)[:8000]):
        with pytest.raises(kallsyms.NoSymbols):
            kallsyms.read(data)
    with pytest.raises(kallsyms.NoSymbols, match="vmlinux"):
        kernel.read(b"MZ" * 100)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30000), st.binary(min_size=1, max_size=8), st.integers(0, 30000))
def test_damaged_symbols(at: int, change: bytes, cut: int) -> None:
    """They are read, or refused."""
    image = bytearray(kallsyms_image(after=bool(at % 2)))
    image[at : at + len(change)] = change
    with contextlib.suppress(kallsyms.NoSymbols):
        assert all(isinstance(name, str) for name in kallsyms.read(bytes(image[: len(image) - cut])))


def types() -> bytes:
    """struct outer { int first; struct { int; union { long inner; } }; unsigned flag: 3; } behind a typedef and an enum."""
    strings = b"\0int\0outer\0first\0inner\0flag\0"

    def at(word: bytes) -> int:
        return strings.index(b"\0" + word + b"\0") + 1

    made = struct.pack("<IIII", at(b"int"), 1 << 24, 4, 32)
    made += struct.pack("<III", 0, 6 << 24 | 1, 4) + struct.pack("<II", at(b"int"), 7)
    made += struct.pack("<III", 0, 5 << 24 | 1, 8) + struct.pack("<III", at(b"inner"), 1, 0)
    made += struct.pack("<III", 0, 4 << 24 | 2, 16) + struct.pack("<III", 0, 1, 0) + struct.pack("<III", 0, 3, 64)
    made += struct.pack("<III", at(b"outer"), 1 << 31 | 4 << 24 | 3, 28) + struct.pack("<III", at(b"first"), 1, 0)
    made += struct.pack("<III", 0, 4, 32) + struct.pack("<III", at(b"flag"), 1, 3 << 24 | 192)
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(made), len(made), len(strings)) + made + strings


def test_offsets() -> None:
    wanted = ("outer.first", "outer.inner", "outer.flag", "outer.none", "nothing.first")
    assert btf.Types(types()).offsets(wanted) == {"outer.first": 0, "outer.inner": 12, "outer.flag": 24}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=4), st.integers(0, 200))
def test_damaged_types(at: int, change: bytes, cut: int) -> None:
    data = bytearray(types())
    data[at : at + len(change)] = change
    with contextlib.suppress(btf.NoTypes):
        btf.Types(bytes(data[: len(data) - cut])).offsets(["outer.first", "outer.inner"])
