"""The figures of one machine's memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trivisor.launch.cgroup_memory import waited


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Bytes, and counts since the machine was started. None: nobody counts it there, or a virtual machine is paused and cannot be asked."""

    limit: int | None
    """What it may have. Of a virtual machine, what it has."""
    used: int | None
    """What its programs and their kernel hold. On the vm wall without what could be dropped at once."""
    cache: int | None
    """Of files of a disk; it is dropped when programs want the room."""
    swap: int | None
    pressure: float | None
    """The part, 0 to 1, of the last ten seconds in which some program waited for memory."""
    major_faults: int | None
    """How often a program waited for a page of its own to come from a disk."""
    private: int
    """What only this machine has of the host's memory."""
    shared: int
    """What it shares: ice, an image's files."""
    merged: int | None = None
    """Of `private`, what the host's kernel keeps once with equal pages of others, or may yet (KSM); None where it does not say."""


def of_guest(limit: int, private: int, shared: int, *, meminfo: str, vmstat: str, pressure: str) -> MemoryStats:
    """Return what a guest's own proc(5) says, as far as it is to be believed."""
    sizes = {name: int(value) << 10 for name, value in re.findall(r"^(\w+): +(\d{1,15}) kB$", meminfo, re.MULTILINE)}
    faults = re.search(r"^pgmajfault (\d{1,18})$", vmstat, re.MULTILINE)
    return MemoryStats(
        limit=limit,
        used=_left(sizes, "MemTotal", "MemAvailable"),
        cache=_left(sizes | {"Files": sizes.get("Cached", 0) + sizes.get("Buffers", 0)}, "Files", "Shmem"),
        swap=_left(sizes, "SwapTotal", "SwapFree"),
        pressure=waited(pressure),
        major_faults=int(faults[1]) if faults else None,
        private=private,
        shared=shared,
    )


def available(meminfo: str) -> int | None:
    """Return how much a guest says that it could give to programs without swapping."""
    found = re.search(r"^MemAvailable: +(\d{1,15}) kB$", meminfo, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _left(sizes: dict[str, int], whole: str, part: str) -> int | None:
    return max(0, sizes[whole] - sizes[part]) if whole in sizes and part in sizes else None
