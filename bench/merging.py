"""What idle virtual machines take with equal pages kept once: a part of bench/hardware.py, as root, on a host whose kernel has KSM."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.common import Row, Series, row
from trivisor import VMM, Machine
from trivisor.core.paths import Home, MachineDir, default_home
from trivisor.core.units import MIB
from trivisor.vmm import procs
from trivisor.vmm.dedupe import KSM
from trivisor.vmm.engines.vm.engine import VmEngine

IMAGE = "debian"
MACHINES = int(os.environ.get("TRIVISOR_BENCH_MACHINES", "6"))
SETTLE, MOST = 5.0, 600.0


def rows(quick: bool) -> list[Row]:
    """Boot machines, weigh them, have their pages merged, and weigh them again."""
    if os.geteuid() or not KSM.is_dir():
        return []
    count = min(MACHINES, 4) if quick else MACHINES
    without, merged = Series(), Series()
    with VMM(engines=[VmEngine(Home(default_home()), ice="off")]) as vmm, ExitStack() as stack:
        machines = [stack.enter_context(vmm.run(IMAGE, wall="vm", memory=256 * MIB)) for _ in range(count)]
        time.sleep(SETTLE)
        without.values.append(_weight(machines))
        for machine in machines:
            machine.memory.dedupe()
        with vmm.dedupe.scanning(pages=20_000):
            merged.values.append(_settled(vmm, machines))
    return [row(f"{count} idle VMs, cold-booted, equal pages kept once", merged, "MB", peer="the same without", against=without, share=0.5)]


def _weight(machines: Sequence[Machine]) -> float:
    """What they take of the host, QEMU and keepers with it, in MB: a page that several map counts for each by its share (Pss)."""
    taken = 0
    for machine in machines:
        for pid in procs.tree(MachineDir(Path(machine.info()["folder"]))):
            said = (Path("/proc") / pid / "smaps_rollup").read_text()
            taken += sum(int(size) for size in re.findall(r"^(?:Pss|SwapPss): +(\d+) kB$", said, re.MULTILINE))
    return taken / 1024


def _settled(vmm: VMM, machines: Sequence[Machine]) -> float:
    """Return what they take when two looks at everything have made it no less."""
    deadline = time.monotonic() + MOST
    weight, scans = _weight(machines), vmm.dedupe.report().scans
    while time.monotonic() < deadline:
        time.sleep(SETTLE)
        if (now := vmm.dedupe.report().scans) < scans + 2:
            continue
        before, weight, scans = weight, _weight(machines), now
        if weight > before * 0.995:
            break
    return weight
