"""The same life behind every wall that this host offers, in one table; and at the end a look for anything that is left of it.

create, start, exec, pause, resume, stop, start again, delete
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor import VMM, Machine
from trivisor.core.errors import TrivisorError
from trivisor.core.paths import MachineDir
from trivisor.core.process import Who, start_time

IMAGE = "debian"
NAME = "demo"
PROGRAM = """\
import os, platform
primes = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
print(f"Python {platform.python_version()} on Linux {platform.release()}, host name {platform.node()}")
print(f"my process id is {os.getpid()}; the {len(primes)}th prime is {primes[-1]}")
print(f"on the disk: {open('/root/note').read().strip()}")
"""
WRITTEN = "this was written before the machine was stopped"

Times = dict[str, float]
"""Milliseconds by step."""


@contextmanager
def step(times: Times, what: str) -> Iterator[None]:
    """Note how long the body takes."""
    began = time.perf_counter()
    yield
    times[what] = (time.perf_counter() - began) * 1000


def show(output: str) -> None:
    """Print what the machine printed."""
    for line in output.splitlines():
        print(f"    | {line}", flush=True)


def family(pid: int) -> set[Who]:
    """Return the processes under `pid`, itself too."""
    started = start_time(pid)
    found = set() if started is None else {Who(pid, started)}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found |= family(int(child))
    return found


def folder_of(vm: Machine) -> MachineDir:
    """Return the machine's own folder, which must be gone at the end."""
    return MachineDir(Path(vm.info()["folder"]))


def watched(vm: Machine) -> set[Who]:
    """Return the host processes of a running machine: its keeper and all that is under it."""
    return family(int(folder_of(vm).keeper.read_text().split()[0]))


def still_there(processes: set[Who]) -> set[Who]:
    """Return those that have not ended within 5 s: a killed process takes a moment to fall, and nobody is told when."""
    end = time.monotonic() + 5
    while (left := {who for who in processes if who.alive()}) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def live(vm: Machine, times: Times) -> set[Who]:
    """Take the machine through its life, and return all host processes it had."""
    with step(times, "start"):
        vm.start(progress=lambda words: print(f"    {words} ...", flush=True))
    processes = watched(vm)
    vm.files.write_text("/root/note", f"{WRITTEN}\n")
    with step(times, "exec: a Python program"):
        result = vm.exec(["python3", "-c", PROGRAM], check=True)
    show(result.text)
    with step(times, "exec: /bin/true"):
        vm.exec(["/bin/true"], check=True)
    with step(times, "pause"):
        vm.pause()
    with step(times, "resume"):
        vm.resume()
    with step(times, "stop"):
        vm.stop()
    with step(times, "start again"):
        vm.start()
    processes |= watched(vm)
    with step(times, "exec: the program again; the disk is as it was"):
        result = vm.exec(["python3", "-c", PROGRAM], check=True)
    assert WRITTEN in result.text
    with step(times, "stop again"):
        vm.stop()
    return processes


def behind(vmm: VMM, wall: str) -> tuple[Times, list[str]]:
    """Live one life behind `wall`. Return its times, and what is left of the machine."""
    print(f"{wall}:", flush=True)
    times: Times = {}
    name = f"{NAME}-{wall}"
    for old in vmm.list():
        if old.name == name:  # a demo that was killed leaves its machine, as any program's would be left
            old.delete(force=True)
    with step(times, "create"):
        vm = vmm.create(IMAGE, name=name, wall=wall, cpus=1, memory="256M")
    folder = folder_of(vm).root
    try:
        processes = live(vm, times)
    finally:
        with step(times, "delete"):
            vm.delete(force=True)
    left = [f"process {who.pid}" for who in still_there(processes)]
    left += [str(folder)] if os.path.lexists(folder) else []
    left += [f"machine {name}" for machine in vmm.list() if machine.name == name]
    return times, left


def print_table(lives: dict[str, Times]) -> None:
    """Print steps by walls."""
    print(f"\n{'milliseconds':<48}" + "".join(f"{wall:>12}" for wall in lives))
    for what in next(iter(lives.values())):
        print(f"{what:<48}" + "".join(f"{times[what]:12.1f}" for times in lives.values()))


def main() -> int:
    """Run the demo. Exit status 1 if no wall can be used, or anything of the machines is left."""
    vmm = VMM()
    lives: dict[str, Times] = {}
    left: list[str] = []
    for report in vmm.walls():
        if report.available:
            lives[report.wall], rest = behind(vmm, report.wall)
            left += rest
        else:
            print(f"{report.wall}: not here: {report.why} ({report.remedy})")
    if lives:
        print_table(lives)
    print(f"\nleft behind: {', '.join(left) or 'nothing'}")
    return 1 if left or not lives else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrivisorError as error:
        print(f"\n{error}\nhint: {error.hint}" if error.hint else f"\n{error}", file=sys.stderr)
        sys.exit(1)
