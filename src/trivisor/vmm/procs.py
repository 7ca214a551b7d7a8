"""What a machine's processes take on the host, for walls whose machines are trees of processes and hosts that give no control groups."""

from __future__ import annotations

import os
from pathlib import Path

from trivisor.core.paths import MachineDir
from trivisor.vmm.engine import Usage

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")


def usage(place: MachineDir) -> Usage:
    """Return what the machine's processes take, where no control group counts it: those there are now (proc(5), statm)."""
    private = shared = 0
    seconds = 0.0
    waiting = [place.keeper.read_text().split()[0]] if place.keeper.exists() else []
    while waiting:
        folder = Path("/proc") / waiting.pop()
        try:
            _, resident, file, *_ = (int(word) for word in (folder / "statm").read_text().split())
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            waiting += (folder / "task" / folder.name / "children").read_text().split()
        except OSError:  # it has ended
            continue
        private += (resident - file) * _PAGE
        shared += file * _PAGE
        seconds += (int(fields[11]) + int(fields[12])) / _TICK
    return Usage(private=private, shared=shared, cpu_seconds=seconds)
