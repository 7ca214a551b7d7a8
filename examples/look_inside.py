"""Look into a machine that knows nothing of it: its processes while it is paused, and a word of a program's until that writes it."""

from __future__ import annotations

import threading

from trivisor import VMM, Machine
from trivisor.vos.memory.service import Change
from trivisor.vos.memory.tasks import GuestProcess

PROGRAM = """
import sys
purse = bytearray(16)
purse[:] = b'purse:' + b'%010d' % 100
print('ready', flush=True)
sys.stdin.readline()
purse[6:] = b'%010d' % 42
sys.stdin.readline()
"""


def processes(vm: Machine) -> list[GuestProcess]:
    """Return what runs in a machine, out of its kernel's own list; it is paused meanwhile, and none the wiser."""
    vm.pause()
    try:
        return vm.memory.processes()
    finally:
        vm.resume()


def spent(vm: Machine) -> Change:
    """Return how a program changes a number of its own, seen from outside."""
    program = vm.spawn(["python3", "-c", PROGRAM])
    assert program.stdout.readline() == b"ready\n"
    *_, purse = vm.memory.search(b"purse:0000000100", pid=program.pid)
    vm.memory.write(purse + 6, b"0000000777", pid=program.pid)
    soon = threading.Timer(1.0, lambda: program.stdin.write(b"\n"))
    soon.start()
    try:
        return vm.memory.watch(purse, 16, pid=program.pid, timeout=30)
    finally:
        soon.join()
        program.kill()


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall="vm") as machine:
        for process in processes(machine):
            print(f"{process.pid:5} {process.parent:5} {process.uid:5} {' '.join(process.argv) or f'[{process.name}]'}")
        print(spent(machine))
