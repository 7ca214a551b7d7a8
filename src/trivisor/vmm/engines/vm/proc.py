"""What processes take on the host (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from trivisor.core.paths import MachineDir
from trivisor.core.process import start_time
from trivisor.vmm.engine import Usage

_TICK = os.sysconf("SC_CLK_TCK")


def keeper_pid(place: MachineDir) -> int | None:
    """Return the keeper's pid, or None if it does not run any more."""
    try:
        pid, started = place.keeper.read_text().split()
        return int(pid) if start_time(int(pid)) == int(started) else None
    except (OSError, ValueError):
        return None


def usage(pids: Iterable[int], *, own_shm: bool = False) -> Usage:
    """Return the sum over `pids`; one that has ended counts nothing.

    `private` is anonymous memory, swapped out or not: pages that nobody else can have. Pages of files (ice, programs,
    libraries) count as shared even when only one process maps them now: the host can drop them or share them. With `own_shm`
    shared memory is theirs alone, too.
    """
    private = shared = 0
    cpu = 0.0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            continue
        sizes = {word[0].rstrip(":"): int(word[1]) << 10 for line in rollup.splitlines()[1:] if len(word := line.split()) == 3}
        own = sizes.get("Pss_Shmem", 0) if own_shm else 0
        # In neither of the other figures; a machine's huge pages are its own.
        private += sizes.get("Private_Hugetlb", 0) + sizes.get("Shared_Hugetlb", 0)
        private += sizes.get("Anonymous", 0) + sizes.get("Swap", 0) + own
        shared += max(0, sizes.get("Rss", 0) - sizes.get("Anonymous", 0) - own)
        fields = stat.rpartition(b")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / _TICK
    return Usage(private=private, shared=shared, cpu_seconds=cpu)
