"""How quickly does a pool hand over a machine that has run its first command, and how quickly is there another?"""

from __future__ import annotations

import time

from bench.common import Row, Series, main, row
from trivisor import VMM
from trivisor.core.spec import WALLS, Wall

IMAGE = "debian"
TRUE = ["/bin/true"]
BOUNDS = {"vm": 20.0, "gvisor": None, "container": 3.0}
NOTES = """
take + exec: from a full pool that is at rest, until /bin/true has ended in the machine. Refilled: from there until the pool is full again,
one machine. The peer is create + start + exec without a pool.
"""


def taken(vmm: VMM, wall: Wall, rounds: int, **peer: Series) -> list[Row]:
    """Measure one wall. Of `peer`, other programs' times, each has a row of its own beside ours."""
    took, filled, without = Series(), Series(), Series()
    with vmm.pool(IMAGE, wall=wall, size=2, memory="256M", warmup=TRUE) as pool:
        for number in range(rounds + 1):
            pool.wait(120)
            time.sleep(0.05)  # what was made a moment ago has its last threads end
            with took.timed():
                vm = pool.take()
                vm.exec(TRUE, check=True)
            with filled.timed():
                pool.wait(120)
            vm.delete(force=True)
            if not number:  # modules are imported, files read
                took.values.clear()
    for _ in range(max(2, rounds // 3)):
        with without.timed():
            vm = vmm.run(IMAGE, wall=wall, memory="256M")
            vm.exec(TRUE, check=True)
        vm.delete(force=True)
    name = {"vm": "vm", "gvisor": "gVisor", "container": "container"}[wall]
    return [
        row(f"{name}, from a warm pool: take + exec", took, "ms", bound=BOUNDS[wall], peer="create + start + exec", against=without),
        *(row(f"{name}, from a warm pool: take + exec", took, "ms", peer=other, against=series) for other, series in peer.items()),
        row(f"{name}, a pool: refilled after", filled, "ms"),
    ]


def rows(quick: bool) -> list[Row]:
    """Measure the walls that this host offers."""
    with VMM() as vmm:
        able = {report.wall for report in vmm.walls() if report.available}
        return [line for wall in WALLS if wall in able for line in taken(vmm, wall, 5 if quick else 20)]


if __name__ == "__main__":
    main(rows, NOTES)
