"""What a control group says of its memory, in version 1's words and in version 2's (memory.rst of each)."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from trivisor.launch.cgroup_place import Place, write


@dataclass(frozen=True)
class MemoryUse:
    """One group's memory. Bytes; counts since the group was made."""

    limit: int | None
    """None: no limit."""
    used: int
    fixed: int
    """Of `used`, what cannot be dropped: memory of no file of a disk."""
    cache: int
    swap: int
    major_faults: int
    pressure: float | None
    """The part, 0 to 1, of the last ten seconds in which something in it waited for memory; None where the kernel does not say (v1)."""


def read(place: Place) -> MemoryUse:
    """Return what a group with a memory controller says."""
    stat = place.table("memory.stat")
    if place.unified:
        return MemoryUse(
            limit=_limit(place.read("memory.max")),
            used=place.number("memory.current"),
            fixed=stat.get("anon", 0) + stat.get("shmem", 0),
            cache=stat.get("file", 0) - stat.get("shmem", 0),
            swap=place.number("memory.swap.current"),
            major_faults=stat.get("pgmajfault", 0),
            pressure=waited(place.read("memory.pressure")),
        )
    return MemoryUse(
        limit=_limit(place.read("memory.limit_in_bytes")),
        used=place.number("memory.usage_in_bytes"),
        fixed=stat.get("total_rss", 0) + stat.get("total_shmem", 0),
        cache=stat.get("total_cache", 0) - stat.get("total_shmem", 0),
        swap=stat.get("total_swap", 0),
        major_faults=stat.get("total_pgmajfault", 0),
        pressure=None,
    )


def reclaim(place: Place, size: int) -> int:
    """Have the kernel take back `size` bytes of what a group holds: files that it read, and where there is swap the rest; return how many
    it took. Version 1 takes all that it can, whatever `size` is."""
    before = _used(place)
    # EAGAIN, EBUSY: less than was asked for. A kernel before 5.19 has no memory.reclaim.
    with contextlib.suppress(OSError):
        write(place.path / ("memory.reclaim" if place.unified else "memory.force_empty"), str(size) if place.unified else "0")
    return max(0, before - _used(place))


def _used(place: Place) -> int:
    return place.number("memory.current" if place.unified else "memory.usage_in_bytes")


def waited(text: str) -> float | None:
    """Return the ten seconds' average of the "some" line of pressure stall information (psi.rst), 0 to 1; None if there is none."""
    found = re.search(r"^some avg10=(\d{1,3}(?:\.\d{1,4})?) ", text, re.MULTILINE)
    return float(found[1]) / 100 if found else None


def _limit(text: str) -> int | None:
    word = text.strip()
    # v1 says "no limit" by the largest number that is a whole number of pages.
    return int(word) if word.isdigit() and int(word) < (1 << 63) - os.sysconf("SC_PAGE_SIZE") else None
