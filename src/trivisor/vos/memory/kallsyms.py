"""The symbols that a Linux kernel carries in itself (kallsyms), out of an uncompressed vmlinux whose ELF symbols were stripped. Pure.

The tables have no header. What gives them away is the table of tokens, in which the digits stand one after the other; the others are
found from there, in the order that scripts/kallsyms.c writes them: before 6.4 offsets, base, count, names, markers, (an order by name,)
tokens, index; from 6.4 on count, names, markers, tokens, index, offsets, base.
"""

from __future__ import annotations

import struct
from array import array

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_KERNEL = 0xFFFF_FFFF_0000_0000
_LEAST, _MOST = 1000, 1 << 20
_FAR = 32 << 20
"""How many symbols there may be, and how many bytes their names and markers may take."""


class NoSymbols(ValueError):
    """The image has no table of symbols, or one of a form that is not known."""


def read(image: bytes) -> dict[str, int]:
    """Return the symbols' names and addresses, as the kernel was linked; of a name that several have the first. Raises NoSymbols."""
    at = -1
    while (at := image.find(_DIGITS, at + 1)) >= 0:
        tokens = _tokens(image, at)
        if tokens is not None:
            break
    else:
        raise NoSymbols("it carries no table of symbols")
    words, begin, index_end = tokens
    try:
        count, names, counted_at = _names(image, begin)
        addresses = _after(image, index_end, count) or _before(image, counted_at, count)
    except (struct.error, IndexError) as error:
        raise NoSymbols("its table of symbols is cut short") from error
    if addresses is None:
        raise NoSymbols("its symbols have no addresses that are known")
    return _expand(image, words, names, addresses)


def _tokens(image: bytes, digits: int) -> tuple[list[bytes], int, int] | None:
    """Return the 256 tokens, where they begin and where their index ends, if this is their table."""
    ends, at = [], digits
    for _ in range(48, 256):
        at = image.find(b"\0", at, at + 4096) + 1
        if not at:
            return None
        ends.append(at)
    for align in (8, 4, 2):
        place = at + -at % align
        index = array("H", image[place : place + 512].ljust(512, b"\0"))
        begin = digits - index[48]
        if index[0] == 0 and begin > 0 and [begin + index[49 + n] for n in range(207)] == ends[:-1]:
            words = [image[begin + offset : image.find(b"\0", begin + offset)] for offset in index]
            return words, begin, place + 512
    return None


def _names(image: bytes, tokens: int) -> tuple[int, int, int]:
    """Return how many names there are, where they begin, and where their count stands.

    A count is known by what follows it: so many names, and then the markers, which say where every 256th of them begins.
    """
    lowest = max(0, tokens - _FAR) & -8
    numbers = array("Q", image[lowest : tokens & -8])
    for index in range(len(numbers) - 1, -1, -1):
        count = numbers[index]
        if _LEAST < count < _MOST:
            at = lowest + index * 8
            names = at + 8
            if names + 2 * count < tokens and (second := _hop(image, names, 256, tokens)):
                end = _hop(image, names, count, tokens)
                if end and struct.unpack_from("<II", image, end + -end % 8) == (0, second - names):
                    return count, names, at
    raise NoSymbols("its symbols have no names")


def _hop(image: bytes, at: int, count: int, end: int) -> int:
    """Return where the names after the first `count` begin; 0 if these are no names."""
    for _ in range(count):
        size = image[at]
        at += 1
        if size & 0x80:  # from 6.1 on a name may be longer than 127 tokens
            size = size & 0x7F | image[at] << 7
            at += 1
        at += size
        if not size or at > end:
            return 0
    return at


def _after(image: bytes, index_end: int, count: int) -> list[int] | None:
    at = index_end + -index_end % 8
    base = at + count * 4
    return _addresses(image, at, base + -base % 8, count)


def _before(image: bytes, counted_at: int, count: int) -> list[int] | None:
    base = counted_at - 8
    for padding in (0, 4):
        found = _addresses(image, base - padding - count * 4, base, count)
        if found and found == sorted(found):
            return found
    return _addresses(image, base - (count * 4 + count * 4 % 8), base, count)


def _addresses(image: bytes, offsets: int, base_at: int, count: int) -> list[int] | None:
    if offsets < 0 or base_at + 8 > len(image):
        return None
    (base,) = struct.unpack_from("<Q", image, base_at)
    if base < _KERNEL:
        return None
    values = array("i", image[offsets : offsets + count * 4])
    if min(values) < 0:
        # Per-processor symbols are absolute, and those of the kernel below the base (CONFIG_KALLSYMS_ABSOLUTE_PERCPU).
        return [base - 1 - value if value < 0 else value for value in values]
    return [base + value for value in values]


def _expand(image: bytes, words: list[bytes], names: int, addresses: list[int]) -> dict[str, int]:
    found: dict[str, int] = {}
    at = names
    for address in addresses:
        size = image[at]
        at += 1
        if size & 0x80:
            size = size & 0x7F | image[at] << 7
            at += 1
        # The first letter is the symbol's kind, as nm(1) has it.
        name = b"".join([words[token] for token in image[at : at + size]])[1:]
        at += size
        found.setdefault(name.decode("ascii", "replace"), address)
    return found
