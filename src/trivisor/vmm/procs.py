"""What a machine takes on the host, for walls whose machines are trees of processes: as its control group counts, or by its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trivisor.core.paths import MachineDir
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm.engine import Box, Usage

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")


def usage(box: Box) -> Usage:
    """Return what all of the machine takes. Private is anonymous memory; pages of files count as shared."""
    group = Cgroup.find(box.home, box.id)
    if group is None:
        return uncounted(box.dir)
    used = group.usage()
    return Usage(private=used.anonymous, shared=max(0, used.memory - used.anonymous), cpu_seconds=used.cpu_seconds)


def uncounted(place: MachineDir) -> Usage:
    """The same where no control group counts: of the processes that there are now, and the keeper (proc(5), statm)."""
    private = shared = 0
    seconds = 0.0
    for pid in tree(place):
        folder = Path("/proc") / pid
        try:
            _, resident, file, *_ = (int(word) for word in (folder / "statm").read_text().split())
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        private += (resident - file) * _PAGE
        shared += file * _PAGE
        seconds += (int(fields[11]) + int(fields[12])) / _TICK
    return Usage(private=private, shared=shared, cpu_seconds=seconds)


def tree(place: MachineDir) -> Iterator[str]:
    """Give the pids of a machine's keeper and of all that it began, as the host numbers them."""
    try:
        waiting = [place.keeper.read_text().split()[0]]
    except (OSError, IndexError):
        return
    while waiting:
        pid = waiting.pop()
        yield pid
        # One that ends now has none, and a thread of one that goes on may end, too.
        with suppress(OSError):
            for thread in (Path("/proc") / pid / "task").iterdir():
                with suppress(OSError):
                    waiting += (thread / "children").read_text().split()
