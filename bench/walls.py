"""What do the container and the gVisor wall cost, beside the programs that do the like?

Times are of the Python calls, as a user sees them. Every peer runs /bin/true in the same image's root, turn by turn with us.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.common import Row, Series, main, row
from bench.peers import Peer, peers
from trivisor import VMM, HostLacks, Machine
from trivisor.vmm.engines.gvisor import runsc

IMAGE = "debian"
TRUE = ["/bin/true"]
LIMITED: dict[str, Any] = {"network": "nat", "memory": "64M", "cpus": 0.5, "pids": 64}
THREADS = 16
NOTES = """
A life is create, start, exec of /bin/true and delete. The peers' lives are whole processes: bwrap and runc without network or
limits, `runsc do` with the runsc and on the platform that our machines have. A peer that is missing is not installed, or does not run here.
Memory over many is the loss of MemAvailable, the machines' page tables, control groups and kernel objects among it.
Interfaces and mounts are those of the whole host: other programs that make some disturb these two rows.
"""


def _life(vmm: VMM, **spec: Any) -> None:
    with vmm.run(IMAGE, wall="container", **spec) as vm:
        vm.exec(TRUE, check=True)


def _lives(vmm: VMM, rounds: int, others: dict[str, Peer]) -> tuple[Series, Series, Series]:
    """Time lives without network and limits beside bwrap, such beside runc and docker, and lives with them, turn by turn.

    What docker leaves to be done after its end would be counted as whatever runs next: bwrap has rounds of its own.
    """
    plain, beside, limited = Series(), Series(), Series()
    for _ in range(rounds):
        with plain.timed():
            _life(vmm)
        others["bwrap"].measure()
    for _ in range(rounds):
        with limited.timed():
            _life(vmm, **LIMITED)
    for _ in range(rounds // 2):
        with beside.timed():
            _life(vmm)
        for name in ("runc", "docker"):
            others[name].measure()
    return plain, beside, limited


def _gvisor(vmm: VMM, rounds: int, other: Peer) -> Series:
    """Time create, start and exec behind gVisor, turn by turn with its peer."""
    series = Series()
    for _ in range(rounds):
        with series.timed():
            vm = vmm.create(IMAGE, wall="gvisor")
            vm.start()
            vm.exec(TRUE, check=True)
        vm.delete(force=True)
        other.measure()
    return series


def _verbs(vm: Machine, rounds: int) -> dict[str, Series]:
    """Time what a running machine does; the first command warms it."""
    found = {verb: Series() for verb in ("exec", "pause", "resume")}
    vm.exec(TRUE, check=True)
    for _ in range(rounds):
        with found["exec"].timed():
            vm.exec(TRUE, check=True)
        with found["pause"].timed():
            vm.pause()
        with found["resume"].timed():
            vm.resume()
    return found


def _available() -> float:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) / 1024


def _family(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [pid, *(found for child in children for found in _family(child))]


def _pss(vm: Machine) -> float:
    """Return MB that its processes on the host have, a page that several have shared out among them."""
    total = 0
    for pid in _family(int(Path(vm.info()["folder"], "keeper").read_text().split()[0])):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def _many(vmm: VMM, count: int, found: dict[str, Series]) -> None:
    """Start `count` at once, each answering a command, and measure: ms for each, MB of the host's memory each, MB of PSS each."""

    def begin(_: int) -> Machine:
        vm = vmm.run(IMAGE, wall="container")
        vm.exec(TRUE, check=True)
        return vm

    with ThreadPoolExecutor(THREADS) as pool:
        before, began = _available(), time.perf_counter()
        machines = list(pool.map(begin, range(count)))
        took = time.perf_counter() - began
        found["memory"].values.append((before - _available()) / count)
        found["start"].values.append(took / count * 1000)
        found["pss"].values += [_pss(vm) for vm in machines[:: max(1, count // 20)]]
        list(pool.map(lambda vm: vm.delete(force=True), machines))


def _groups(ids: set[str]) -> int:
    return sum(name in ids for _, names, _ in os.walk("/sys/fs/cgroup") for name in names)


def _own_memory() -> float:
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def _mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


def _host() -> dict[str, float]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "MB of this process": _own_memory(),
        "mounts": len(_mounts()),
        "interfaces": sum(name.startswith("trv") for name in os.listdir("/sys/class/net")),
    }


def _left(vmm: VMM, count: int) -> list[Row]:
    """Live `count` lives one after another, each tenth with network and limits, and compare the host before and after."""
    for _ in range(5):  # what a process makes once
        _life(vmm, **LIMITED)
    before, mounts, failed, ids = _host(), _mounts(), 0, set()
    began = time.perf_counter()
    for number in range(count):
        try:
            with vmm.run(IMAGE, wall="container", **(LIMITED if number % 10 == 0 else {})) as vm:
                ids.add(vm.id)
                vm.exec(TRUE, check=True)
        except Exception as error:  # counted, said, and a bound that is missed
            print(f"life {number}: {error}", flush=True)
            failed += 1
    rate = count / (time.perf_counter() - began)
    end = time.monotonic() + 10  # the kernel takes namespaces down in its own time
    while _host()["interfaces"] > before["interfaces"] and time.monotonic() < end:
        time.sleep(0.05)
    after = _host()
    for line in _mounts() - mounts:  # ours are never in this table: that says whose it is
        print(f"a mount more: {line}", flush=True)
    rows = [Row(f"{count} lives: failed", failed, "lives", bound=0), Row(f"{count} lives: rate", rate, "per s")]
    for what, was in before.items():
        rows.append(Row(f"{count} lives: {what} more", after[what] - was, "", bound=8 if "MB" in what else 0))
    return [*rows, Row(f"{count} lives: control groups left", _groups(ids), "", bound=0)]


@contextmanager
def _running(vmm: VMM, wall: str) -> Iterator[Machine]:
    with vmm.run(IMAGE, wall=wall) as vm:
        yield vm


def _container_rows(vmm: VMM, quick: bool, others: dict[str, Peer]) -> list[Row]:
    plain, beside, limited = _lives(vmm, 10 if quick else 40, others)
    with _running(vmm, "container") as vm:
        verbs = _verbs(vm, 20 if quick else 100)
    count = 20 if quick else 200
    many = {what: Series() for what in ("start", "memory", "pss")}
    for _ in range(1 if quick else 3):
        _many(vmm, count, many)
    life = "container, no network: a life"
    return [
        row(life, plain, "ms", bound=15),
        row(f"{life}, at most 3 x", plain, "ms", peer=others["bwrap"].name, against=others["bwrap"].series, share=3.0),
        *(
            row(life, beside, "ms", peer=others[name].name, against=others[name].series)
            for name in ("runc", "docker")
            if not others[name].why
        ),
        row("container, NAT and limits: a life", limited, "ms", bound=30),
        row("container: exec", verbs["exec"], "ms", bound=2),
        row("container: pause", verbs["pause"], "ms", bound=3),
        row("container: resume", verbs["resume"], "ms", bound=3),
        row("container: PSS of an idle one", many["pss"], "MB", bound=1.5),
        row(f"container: MemAvailable of each of {count}", many["memory"], "MB", bound=3),
        row(f"container: start and exec, each of {count} at once (60 a second)", many["start"], "ms", bound=1000 / 60),
        *_left(vmm, 100 if quick else 1000),
    ]


def _gvisor_rows(vmm: VMM, quick: bool, other: Peer) -> list[Row]:
    start = _gvisor(vmm, 3 if quick else 10, other)
    with _running(vmm, "gvisor") as vm:
        verbs = _verbs(vm, 20 if quick else 100)
    return [
        row("gvisor: create + start + exec", start, "ms", peer=other.name, against=other.series, share=1.2),
        row("gvisor: exec", verbs["exec"], "ms", bound=2),
        row("gvisor: pause", verbs["pause"], "ms"),
        row("gvisor: resume", verbs["resume"], "ms"),
    ]


def _runsc() -> str:
    try:
        return runsc.locate()
    except HostLacks:
        return "runsc"


def rows(quick: bool) -> list[Row]:
    """Measure the walls that this host offers."""
    vmm = VMM()
    reports = {report.wall: report for report in vmm.walls()}
    _life(vmm)  # unpacks the image's root
    tree = vmm.images.lowers(vmm.images.get(IMAGE).digest)[0]
    platform = (reports["gvisor"].details.get("platform") or "ptrace").split()[0]
    found: list[Row] = []
    with peers(tree, _runsc(), platform) as others:
        for peer in others.values():
            if peer.why:
                print(f"no {peer.name}: {peer.why}", flush=True)
        if reports["container"].available:
            found += _container_rows(vmm, quick, others)
        if reports["gvisor"].available:
            found += _gvisor_rows(vmm, quick, others["runsc"])
    return found


if __name__ == "__main__":
    main(rows, NOTES)
