"""How quickly is a machine's memory read from outside, how quickly do devices come, and what do they and a policy of the network cost?

A machine's own `ps` is the peer of a list of its processes; of a copy of its memory it is a copy of as much inside of one process.
"""

from __future__ import annotations

import os

from bench import devices, merging, network
from bench.common import Row, Series, main, row
from trivisor import VMM, Machine
from trivisor.core.units import MIB

IMAGE = "debian"
PROCESSES = 50
MEMORY = 256 * MIB
NOTES = f"""
The first view of a machine touches what no view has touched: it is a row of its own, each of another machine. A list of processes
is read from a paused machine with 50 of them beside its own and the kernel's. Its peer does what ps does: a program that is started
in the machine reads /proc/PID/stat of every process.
Idle VMs are weighed by Pss, QEMU and all. There are 6 of them, 4 with --quick, or as many as TRIVISOR_BENCH_MACHINES says (the bound is for
20); none without root, who has the host's kernel look for equal pages, until two looks at everything have made it no less.
{devices.NOTES.strip()}
"""
_LIST = ["python3", "-c", "import os; [open('/proc/' + pid + '/stat').read() for pid in os.listdir('/proc') if pid.isdigit()]"]


def _copies(rounds: int) -> Series:
    source, series = bytearray(MEMORY), Series()
    source[:] = os.urandom(MIB) * (MEMORY // MIB)
    for _ in range(rounds):
        with series.timed():
            bytes(source)
    return series


def _firsts(vmm: VMM, rounds: int) -> Series:
    series = Series()
    for _ in range(rounds):
        with vmm.run(IMAGE, wall="vm", memory=MEMORY) as vm, series.timed(), vm.memory.view():
            pass
    return series


def _views(vm: Machine, rounds: int) -> Series:
    series = Series()
    for _ in range(rounds):
        with series.timed(), vm.memory.view():
            pass
    return series


def _lists(vm: Machine, rounds: int) -> tuple[Series, Series]:
    ours, inside = Series(), Series()
    program = vm.spawn(f"for i in $(seq {PROCESSES}); do sleep 1000 & done; echo; wait")
    program.stdout.readline()
    for _ in range(rounds):
        with inside.timed():
            vm.exec(_LIST, check=True)
    vm.pause()
    vm.memory.processes()  # reads the kernel's image, once for each kit
    for _ in range(rounds):
        with ours.timed():
            found = vm.memory.processes()
        assert sum(process.argv == ("sleep", "1000") for process in found) == PROCESSES
    return ours, inside


def rows(quick: bool) -> list[Row]:
    """Time views of 256 MB and lists of 50 processes."""
    rounds = 5 if quick else 20
    with VMM() as vmm:
        copied, firsts = _copies(rounds), _firsts(vmm, max(3, rounds // 4))
        with vmm.run(IMAGE, wall="vm", memory=MEMORY) as vm:
            views = _views(vm, rounds)
            ours, inside = _lists(vm, rounds)
        with vmm.run(IMAGE, wall="vm", memory=MEMORY, ram="shared") as vm:
            mapped = _views(vm, rounds)
    peer = "bytes(bytearray)"
    return [
        row("256 MB of guest memory through view(), the first", firsts, "ms", bound=200, peer=peer, against=copied),
        row("256 MB of guest memory through view()", views, "ms", bound=200, peer=peer, against=copied),
        row('256 MB of guest memory through view(), ram="shared"', mapped, "ms", bound=200, peer=peer, against=copied),
        row("list of 50 processes, read from a paused VM", ours, "ms", bound=300, peer="exec of such a list inside", against=inside),
        *devices.rows(quick),
        *merging.rows(quick),
        *network.rows(quick),
    ]


if __name__ == "__main__":
    main(rows, NOTES)
