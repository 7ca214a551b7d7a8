"""How quickly are machines copied while they run, put away, and brought back, and what does a copy cost?

Each function of MEASURES is one subject: it is given the opened home and how many rounds, and returns its rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import peer
from bench.common import Row, Series, main, row
from bench.life import TRUE, _peer
from trivisor import VMM, Machine
from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import Wall
from trivisor.core.units import MIB
from trivisor.vmm.engines.vm import proc, runner
from trivisor.vmm.engines.vm.engine import VmEngine

IMAGE, MEMORY = "debian", "256M"
CHILDREN = 20
FILES = 10_000
NOTES = f"""
The machine that is copied has 256 MB and one vCPU, and runs Python with 100 MB of random bytes. Times are of the Python calls, and end with
the end of the copy's first /bin/true. A further child is what each of three more costs in one fork. The peer of the
virtual machines is QEMU with default options that boots the same kernel to one command in its initramfs.
Memory is Pss of QEMU and keeper of {CHILDREN} copies that have run a command, the files that they share counted once.
"""
_BUSY = """\
import os, sys
one = os.urandom(1 << 20)
held = [bytes([number]) + one for number in range(100)]
print("there", flush=True)
sys.stdin.read()
"""


@contextmanager
def _busy(vmm: VMM, wall: Wall) -> Iterator[Machine]:
    with vmm.run(IMAGE, wall=wall, memory=MEMORY) as vm:
        vm.exec(TRUE, check=True)
        program = vm.spawn(["python3", "-c", _BUSY])
        assert program.stdout.readline() == b"there\n"
        yield vm


def _there(vmm: VMM, wall: Wall) -> bool:
    return next(report for report in vmm.walls() if report.wall == wall).available


def _forked(vm: Machine, number: int) -> float:
    """Return the milliseconds until each of so many copies has run a command."""
    began = time.perf_counter()
    kids = vm.fork(number)
    for kid in kids:
        kid.exec(TRUE, check=True)
    took = (time.perf_counter() - began) * 1000
    for kid in kids:
        kid.delete(force=True)
    return took


def _created(vmm: VMM, ref: str) -> float:
    began = time.perf_counter()
    vm = vmm.create(snapshot=ref)
    vm.start()
    vm.exec(TRUE, check=True)
    took = (time.perf_counter() - began) * 1000
    vm.delete(force=True)
    return took


def _cold(vmm: VMM, rounds: int) -> Series:
    series = Series()
    with VMM(vmm.home, engines=[VmEngine(Home(vmm.home), ice="off")]) as booting:
        for _ in range(rounds):
            with series.timed():
                vm = booting.create(IMAGE, wall="vm", memory=MEMORY)
                vm.start()
                vm.exec(TRUE, check=True)
            vm.delete(force=True)
    return series


def _weight(vms: list[Machine]) -> float:
    """Return MB of the host's memory that they take together."""
    total = 0
    for vm in vms:
        place = MachineDir(Path(vm.info()["folder"]))
        for pid in (runner.engine(place), proc.keeper_pid(place)):
            with suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total / MIB


def virtual(vmm: VMM, rounds: int) -> list[Row]:
    """Forks, snapshots and suspends of a virtual machine."""
    if not _there(vmm, "vm"):
        return []
    found = {name: Series() for name in ("paused", "one", "further", "taken", "created", "suspend", "resume", "private")}
    for _ in range(2):  # the first makes kit and blank ice, the second the image's own
        with vmm.run(IMAGE, wall="vm", memory=MEMORY):
            pass
    plain, cold = _peer(Home(vmm.home), max(2, rounds // 3)), _cold(vmm, max(2, rounds // 3))
    with _busy(vmm, "vm") as vm:
        for number in range(rounds):
            found["one"].values.append(_forked(vm, 1))
            found["further"].values.append((_forked(vm, 4) - found["one"].values[-1]) / 3)
            with found["taken"].timed():
                kept = vm.snapshot(f"bench{number}", memory=True)
            found["paused"].values.append(kept.paused * 1000)
            found["created"].values.append(_created(vmm, kept.ref))
            vmm.snapshots.remove(kept.ref)
        kids = vm.fork(CHILDREN)
        for kid in kids:
            kid.exec(TRUE, check=True)
        found["private"].values += [kid.stats().private / MIB for kid in kids]
        weight = _weight(kids)
        for kid in kids:
            kid.delete(force=True)
        # Last: what was suspended has no pages of its own any more, and stands still for less.
        for _ in range(rounds):
            with found["suspend"].timed():
                vm.suspend()
            with found["resume"].timed():
                vm.resume()
                vm.exec(TRUE, check=True)
    name = peer.NAME
    return [
        row("vm: fork(1), parent paused for", found["paused"], "ms", bound=150),
        row("vm: fork to first exec in the child", found["one"], "ms", bound=400, peer=name, against=plain),
        row("vm: each further child", found["further"], "ms", bound=220, peer=name, against=plain),
        row("vm: create from a memory snapshot to first exec", found["created"], "ms", bound=250, peer=name, against=plain),
        row("vm: the same, beside our own cold boot", found["created"], "ms", peer="cold boot", against=cold, share=1 / 12),
        row("vm: a snapshot with memory, on the disk", found["taken"], "ms"),
        row("vm: suspend", found["suspend"], "ms", bound=700),
        row("vm: resume to first exec", found["resume"], "ms", bound=350),
        row("vm: private memory of an idle child", found["private"], "MB", bound=55),
        Row(f"vm: {CHILDREN} children of one parent", weight, "MB", bound=1536),
    ]


def files(vmm: VMM, rounds: int) -> list[Row]:
    """Forks of a container: its files go along, its programs do not."""
    if not _there(vmm, "container"):
        return []
    image, layer = Series(), Series()
    with vmm.run(IMAGE, wall="container") as vm:
        for _ in range(rounds):
            with image.timed():
                kid = vm.fork()[0]
            kid.delete(force=True)
        vm.exec(f"mkdir /root/many && cd /root/many && for i in $(seq {FILES}); do echo $i > $i; done", check=True)
        for _ in range(rounds):
            with layer.timed():
                kid = vm.fork()[0]
            kid.delete(force=True)
    return [
        row("container: fork, the image's files alone", image, "ms", bound=20),
        row(f"container: fork, {FILES} files in the writable layer", layer, "ms", bound=600),
    ]


def sentry(vmm: VMM, rounds: int) -> list[Row]:
    """Forks of a gVisor machine."""
    if not _there(vmm, "gvisor"):
        return []
    one = Series()
    with _busy(vmm, "gvisor") as vm:
        for _ in range(rounds):
            one.values.append(_forked(vm, 1))
    return [row("gVisor: fork to first exec in the child", one, "ms")]


MEASURES: list[Callable[[VMM, int], list[Row]]] = [virtual, files, sentry]


def rows(quick: bool) -> list[Row]:
    """Measure one subject after the other."""
    with VMM() as vmm:
        return [line for measure in MEASURES for line in measure(vmm, 3 if quick else 10)]


if __name__ == "__main__":
    main(rows, NOTES)
