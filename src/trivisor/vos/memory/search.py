"""Looking for bytes in memory that is read piece by piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from trivisor.core.errors import BadAddress, InvalidSpec

PIECE = 32 << 20
MAX_MATCH = 4096
"""Bytes of what a regular expression may match across the border of two pieces."""
MAX_SEARCHED = 16 << 30
"""Bytes of one search: a hostile address space maps the same page again and again."""
Fill = Callable[[int, memoryview], int]
"""Fill a buffer from an address on; return how much there was."""


def compiled(pattern: bytes | re.Pattern[bytes]) -> re.Pattern[bytes]:
    """Return the pattern as an expression. Raises InvalidSpec for an empty one, or one of text."""
    if isinstance(pattern, re.Pattern):
        if not isinstance(pattern.pattern, bytes):
            raise InvalidSpec("memory is bytes, and so must the pattern be", hint="write re.compile(b'...')")
        return pattern
    if not isinstance(pattern, bytes) or not 0 < len(pattern) <= MAX_MATCH:
        raise InvalidSpec(
            f"what to look for must be 1 to {MAX_MATCH} bytes", hint="write b'...', or text.encode()" if isinstance(pattern, str) else ""
        )
    return re.compile(re.escape(pattern), re.DOTALL)


def joined(runs: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the (address, size) of `runs`, cut to what lies from `start` up to `end`; neighbours become one."""
    begin, length = 0, 0
    for address, size in runs:
        low, high = max(address, start), min(address + size, end)
        if low >= high:
            continue
        if length and begin + length == low:
            length += high - low
            continue
        if length:
            yield begin, length
        begin, length = low, high - low
    if length:
        yield begin, length


def find(runs: Iterable[tuple[int, int]], fill: Fill, pattern: re.Pattern[bytes], limit: int) -> list[int]:
    """Return the addresses of the first `limit` matches in `runs`. Raises BadAddress after MAX_SEARCHED bytes."""
    found: list[int] = []
    buffer = memoryview(bytearray(PIECE + MAX_MATCH))
    searched = 0
    for address, size in runs:
        offset = 0
        while offset < size:
            part = buffer[: min(size - offset, PIECE + MAX_MATCH)]
            got = fill(address + offset, part)
            last = got < len(part) or offset + got == size
            for match in pattern.finditer(part[:got]):
                if match.start() >= PIECE and not last:
                    break
                found.append(address + offset + match.start())
                if len(found) == limit:
                    return found
            searched += PIECE
            if searched > MAX_SEARCHED:
                raise BadAddress(f"it maps more than {MAX_SEARCHED >> 30} GiB", hint="give start and end")
            # What could not be read ends the piece, not the search: the next page may be there.
            offset += PIECE if got >= PIECE else max(got + 4096 & -4096, 4096)
            if last and got == len(part):
                break
    return found
