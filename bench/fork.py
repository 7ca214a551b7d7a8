"""How quickly are machines copied while they run, put away, and brought back, and what does a copy cost?

One table: virtual machines beside plain QEMU, gVisor beside runsc, containers beside docker, and what all these take from nothing.
Parts of it run alone, too: fork_gvisor.py, pools.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import fork_gvisor, peer, pools
from bench.common import Row, Series, main, row
from bench.fork_peers import COPY, DO, Beginning, beginning
from bench.life import TRUE, _peer
from trivisor import VMM, Machine
from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import Wall
from trivisor.core.units import MIB
from trivisor.vmm.engines.vm import proc, runner
from trivisor.vmm.engines.vm.engine import VmEngine
from trivisor.vos.process import Process

IMAGE, MEMORY = "debian", "256M"
LAYERED: tuple[Wall, ...] = ("container", "gvisor")
CHILDREN = 20
FILES = 10_000
CHANGED = 10
"""MB that a machine changes between two snapshots."""
NOTES = f"""
The machine that is copied has 256 MB and one vCPU, and runs Python with 100 MB of random bytes. Times are of the Python calls, and end with
the end of the copy's first /bin/true. A further child is what each of three more costs in one fork. The peer of the
virtual machines is QEMU with default options that boots the same kernel to one command in its initramfs.
Memory is Pss of QEMU and keeper of {CHILDREN} copies that have run a command, the files that they share counted once. A snapshot's
size is what the home's packs have grown by; beside the first are the bytes that are not zero. The pause is that of a snapshot with
memory, which is taken as a fork's is.

A container's peers run /bin/true, too: docker run, docker create + start, and of a container with the files docker commit + create + start.
gVisor: {" ".join(fork_gvisor.NOTES.split())}

Pools: {" ".join(pools.NOTES.split())}
"""
_BUSY = f"""\
import os, sys
one = os.urandom(1 << 20)
held = [one[number:] + one[:number] for number in range(100)]
print("there", flush=True)
for _ in sys.stdin:
    held[:{CHANGED}] = [os.urandom(1 << 20) for _ in range({CHANGED})]
    print("changed", flush=True)
"""


@contextmanager
def _busy(vmm: VMM, wall: Wall) -> Iterator[tuple[Machine, Process]]:
    with vmm.run(IMAGE, wall=wall, memory=MEMORY) as vm:
        vm.exec(TRUE, check=True)
        program = vm.spawn(["python3", "-c", _BUSY])
        assert program.stdout.readline() == b"there\n"
        yield vm, program


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


def _sizes(vmm: VMM, vm: Machine, program: Process) -> tuple[float, float, float]:
    """Return MB that a snapshot adds to the home, MB of it that are not zero, and MB that the next one adds when 10 MB have changed."""
    packs = [vmm.snapshots.du().packs]
    for name in ("first", "second"):
        kept = vm.snapshot(f"bench-{name}", memory=True)
        packs.append(vmm.snapshots.du().packs)
        if name == "first":
            held = kept.size
            program.stdin.write(b"\n")
            assert program.stdout.readline() == b"changed\n"
    for name in ("second", "first"):
        vmm.snapshots.remove(f"{vm.name}@bench-{name}")
    return (packs[1] - packs[0]) / MIB, held / MIB, (packs[2] - packs[1]) / MIB


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
    found = {name: Series() for name in ("paused", "one", "further", "taken", "created", "suspend", "resume", "private")}
    for _ in range(2):  # the first makes kit and blank ice, the second the image's own
        vmm.run(IMAGE, wall="vm", memory=MEMORY).delete(force=True)
    plain, cold = _peer(Home(vmm.home), max(2, rounds // 3)), _cold(vmm, max(2, rounds // 3))
    with _busy(vmm, "vm") as (vm, program):
        for number in range(rounds):
            found["one"].values.append(_forked(vm, 1))
            found["further"].values.append((_forked(vm, 4) - found["one"].values[-1]) / 3)
            with found["taken"].timed():
                kept = vm.snapshot(f"bench{number}", memory=True)
            found["paused"].values.append(kept.paused * 1000)
            found["created"].values.append(_created(vmm, kept.ref))
            vmm.snapshots.remove(kept.ref)
        first, held, second = _sizes(vmm, vm, program)
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
        row("vm: private memory of an idle child", found["private"], "MB", bound=55),
        Row(f"vm: {CHILDREN} children of one parent", weight, "MB", bound=1536),
        row("vm: suspend", found["suspend"], "ms", bound=700),
        row("vm: resume to first exec", found["resume"], "ms", bound=350, peer=name, against=plain),
        row("vm: a snapshot with memory, packed on the disk", found["taken"], "ms"),
        Row("vm: its size", first, "MB", "what is not zero", held, bound=held),
        Row(f"vm: what the next adds, {CHANGED} MB changed", second, "MB", bound=20),
        row("peer: plain QEMU, cold boot to first command", plain, "ms"),
        row("vm: our own cold boot to first exec", cold, "ms", peer=name, against=plain),
    ]


def files(vmm: VMM, rounds: int, begun: Beginning) -> list[Row]:
    """Forks of a container: its files go along, its programs do not."""
    image, layer, first = Series(), Series(), Series()
    with vmm.run(IMAGE, wall="container") as vm:
        for _ in range(rounds):
            with image.timed():
                kid = vm.fork()[0]
            kid.delete(force=True)
        first.values += [_forked(vm, 1) for _ in range(rounds)]
        vm.exec(f"mkdir /root/many && cd /root/many && for i in $(seq {FILES}); do echo $i > $i; done", check=True)
        for _ in range(rounds):
            with layer.timed():
                kid = vm.fork()[0]
            kid.delete(force=True)
    return [
        row("container: fork, the image's files alone", image, "ms", bound=20),
        *(row("container: fork to first exec", first, "ms", peer=name, against=series) for name, series in begun.docker().items()),
        row(f"container: fork, {FILES} files in the writable layer", layer, "ms", bound=600, peer=COPY, against=begun.copy),
    ]


def sentry(vmm: VMM, rounds: int, begun: Beginning) -> list[Row]:
    """Forks, snapshots and suspends of a gVisor machine."""
    one = Series()
    with _busy(vmm, "gvisor") as (vm, _):
        one.values += [_forked(vm, 1) for _ in range(rounds)]
    fork = row("gVisor: fork to first exec in the child", one, "ms", peer=DO, against=begun.runsc)
    return [fork, *fork_gvisor.measure(vmm, rounds)]


def rows(quick: bool) -> list[Row]:
    """Measure one subject after the other, on the walls that this host offers."""
    rounds = 3 if quick else 10
    found: list[Row] = []
    with VMM() as vmm:
        able = {report.wall for report in vmm.walls() if report.available}
        if "vm" in able:
            found += [*virtual(vmm, rounds), *pools.taken(vmm, "vm", 2 * rounds)]
        begun = Beginning()
        for wall in [wall for wall in LAYERED if wall in able][:1]:
            vmm.run(IMAGE, wall=wall).delete(force=True)  # unpacks the image's root, which the peers have as well
            begun = beginning(vmm, IMAGE, FILES, max(2, rounds // 2))
        if "container" in able:
            found += [*pools.taken(vmm, "container", 2 * rounds, **begun.docker()), *files(vmm, rounds, begun)]
        if "gvisor" in able:
            found += sentry(vmm, rounds, begun)
        return [*found, *begun.rows()]


if __name__ == "__main__":
    main(rows, NOTES)
