"""Sizes and durations as people write them. What is not one is refused."""

from __future__ import annotations

import re

from trivisor.core.errors import InvalidSpec

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MAX_SIZE = 1 << 62
"""More than any file system holds, and what records and QEMU still take as a number."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])?(?:i?B)?", re.IGNORECASE | re.ASCII)
_SCALE = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}


def parse_size(value: int | str, what: str = "size") -> int:
    """Return bytes for `value`: an int (bytes), or text such as "256M", "1.5G", "64KiB".

    Units are powers of 1024. Raises InvalidSpec for anything else, and for zero and less.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidSpec(f"{what} must be bytes or text such as '256M', not {value!r}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise InvalidSpec(f"{what} {value!r} is not a size", hint="write bytes, or text such as 256M or 1G")
        size = int(min(float(match[1]) * _SCALE[(match[2] or "").upper()], 2 * MAX_SIZE))
    if size <= 0:
        raise InvalidSpec(f"{what} must be more than nothing, not {value!r}")
    if size > MAX_SIZE:
        raise InvalidSpec(f"{what} is more than any disk holds")
    return size


def format_size(size: int) -> str:
    """Return `size` (bytes) in the largest unit that keeps it readable: 268435456 is "256M"."""
    for unit, scale in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size >= scale:
            return f"{size / scale:.1f}".rstrip("0").rstrip(".") + unit
    return f"{size}B"


def parse_duration(value: float | str, what: str = "duration") -> float:
    """Return seconds for `value`: a number, or text such as "90", "500ms", "10m", "2h", "1d"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidSpec(f"{what} must be seconds or text such as '10m', not {value!r}")
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if not match:
            raise InvalidSpec(f"{what} {value!r} is not a duration", hint="write seconds, or text such as 90s or 10m")
        seconds = float(match[1]) * _SECONDS[match[2]]
    else:
        seconds = float(min(value, 1e10))
    if not 0 < seconds < 1e9:
        raise InvalidSpec(f"{what} must be more than 0 s and under 30 years, not {value!r}")
    return seconds
