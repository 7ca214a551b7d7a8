"""The whole life of one machine, each step with its time; and at the end a look for anything that is left of it.

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
import os, platform, sys
primes = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
print(f"Python {platform.python_version()} on Linux {platform.release()}, host name {platform.node()}")
print(f"{os.cpu_count()} vCPU; my process id is {os.getpid()}; the {len(primes)}th prime is {primes[-1]}")
print(f"on the disk: {open('/root/note').read().strip()}")
"""


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what is done, and when it is done how long it took."""
    print(f"{what:<62}", end="", flush=True)
    began = time.perf_counter()
    yield
    print(f"{(time.perf_counter() - began) * 1000:9.1f} ms", flush=True)


def show(output: str) -> None:
    """Print what the machine printed."""
    for line in output.splitlines():
        print(f"    | {line}")


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
    """Return the host processes of a running machine: its keeper, the jail, QEMU."""
    return family(int(folder_of(vm).keeper.read_text().split()[0]))


def still_there(processes: set[Who]) -> set[Who]:
    """Return those that have not ended within 5 s: a killed process takes a moment to fall, and nobody is told when."""
    end = time.monotonic() + 5
    while (left := {who for who in processes if who.alive()}) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def live(vm: Machine) -> set[Who]:
    """Take the machine through its life, and return all host processes it had."""
    with step("start"):
        vm.start(progress=lambda words: print(f"\n    {words} ...", end="", flush=True))
    print(f"    ({vm.info()['facts']['start']}; {vm.info()['facts']['accelerator']})")
    processes = watched(vm)
    vm.files.write_text("/root/note", "this was written before the machine was stopped\n")
    with step("exec: a Python program"):
        result = vm.exec(["python3", "-c", PROGRAM], check=True)
    show(result.text)
    with step("exec: /bin/true"):
        vm.exec(["/bin/true"], check=True)
    with step("pause"):
        vm.pause()
    with step("resume"):
        vm.resume()
    with step("stop"):
        vm.stop()
    with step("start again"):
        vm.start()
    print(f"    ({vm.info()['facts']['start']})")
    processes |= watched(vm)
    with step("exec: the same program; the disk is as it was"):
        result = vm.exec(["python3", "-c", PROGRAM], check=True)
    show(result.text)
    with step("stop"):
        vm.stop()
    return processes


def main() -> int:
    """Run the demo. Exit status 1 if anything of the machine is left."""
    with step("open the home"):
        vmm = VMM()
    for old in vmm.list():
        if old.name == NAME:  # a demo that was killed leaves its machine, as any program's would be left
            old.delete(force=True)
    with step(f"create a machine from the image {IMAGE!r}"):
        vm = vmm.create(IMAGE, name=NAME, cpus=1, memory="256M")
    folder = folder_of(vm).root
    try:
        processes = live(vm)
    finally:
        with step("delete"):
            vm.delete(force=True)
    left = [f"process {who.pid}" for who in still_there(processes)]
    left += [str(folder)] if os.path.lexists(folder) else []
    left += [f"machine {machine.name}" for machine in vmm.list() if machine.name == NAME]
    print(f"left behind: {', '.join(left) or 'nothing'} (of {len(processes)} processes and one folder)")
    return 1 if left else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrivisorError as error:
        print(f"\n{error}\nhint: {error.hint}" if error.hint else f"\n{error}", file=sys.stderr)
        sys.exit(1)
