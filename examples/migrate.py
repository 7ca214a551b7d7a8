"""Move a machine from one home to another while a program counts in it, and see that it counts on there."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from trivisor import VMM, Machine

PROGRAM = "i=0; while :; do i=$((i+1)); echo $i >/run/next; mv /run/next /run/count; sleep 0.02; done"


@dataclass(frozen=True)
class Moved:
    """How far the program had counted here, and there; how long it stood still, and all of it took, in seconds."""

    before: int
    after: int
    downtime: float
    seconds: float


def move(vm: Machine, there: VMM, socket: Path, downtime: float = 0.3) -> Moved:
    """Have `vm` count, move it into the home of `there`, and let it count on."""
    vm.spawn(PROGRAM, detach=True)
    vm.exec("until [ -e /run/count ]; do sleep 0.05; done", check=True)
    before = int(vm.files.read("/run/count"))
    address = f"unix:{socket}"
    listens, arrived = threading.Event(), list[Machine]()
    waiting = threading.Thread(target=lambda: arrived.append(there.receive(address, timeout=60, listening=lambda _: listens.set())))
    waiting.start()
    listens.wait(10)
    done = vm.migrate(address, downtime=downtime)
    waiting.join()
    arrived[0].exec(f"until [ $(cat /run/count) -gt {before} ]; do sleep 0.05; done", check=True)
    return Moved(before, int(arrived[0].files.read("/run/count")), done.downtime or 0.0, done.seconds)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, VMM() as here, VMM(Path(folder) / "home") as other:
        machine = here.create("debian", wall="vm")
        machine.start()
        print(move(machine, other, Path(folder) / "socket", downtime=10))
        other.get(machine.name).delete(force=True)
