"""Four ways from one warm state, side by side: keep the best, go on from there.

A machine is brought to a state that took a while: here a Python that has made its data. Then it is forked, each copy tries its own way from
exactly there, and the best result becomes the snapshot that the next round begins with. Behind the vm and gVisor walls the
warm Python itself goes on in each copy; behind the container wall the copies have its files.

    python3 examples/branch.py [vm|gvisor|container]
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from trivisor import VMM, Machine

# The warm state: numbers to be shared out over two heaps of equal sums, and the heap that is the best so far.
WARM = """
numbers = [(7919 * i * i + 104729 * i) % 999983 for i in range(1, 401)]
open("/var/state", "w").write(repr((numbers, [])))
"""
# One way on: move numbers at random for a while, keep what brings the heaps nearer to each other.
TRY = """
from os import urandom  # no two copies draw the same
numbers, heap = eval(open("/var/state").read())
heap, whole = set(heap), sum(numbers)
best = abs(whole - 2 * sum(numbers[i] for i in heap))
for _ in range(3000):
    moved = heap ^ {int.from_bytes(urandom(4), "big") % len(numbers) for _ in range(1 + urandom(1)[0] % 3)}
    gap = abs(whole - 2 * sum(numbers[i] for i in moved))
    if gap < best:
        best, heap = gap, moved
open("/var/state", "w").write(repr((numbers, sorted(heap))))
print(best)
"""


def attempt(machine: Machine) -> int:
    """Try one way, and return how far apart the heaps are at its end."""
    return int(machine.exec(["python3", "-c", TRY], check=True).text)


def main() -> None:
    wall = sys.argv[1] if len(sys.argv) > 1 else "auto"
    with VMM() as vmm, vmm.run("debian", wall=wall, name="explorer") as explorer:
        explorer.exec(["python3", "-c", WARM], check=True)
        for turn in range(1, 4):
            branches = explorer.fork(4)
            try:
                with ThreadPoolExecutor(len(branches)) as crew:
                    gaps = list(crew.map(attempt, branches))
                gap, best = min(zip(gaps, branches, strict=True), key=lambda one: one[0])
                found = best.snapshot(f"turn-{turn}", tags=["best"])
            finally:
                for branch in branches:
                    branch.delete(force=True)
            print(f"turn {turn}: {sorted(gaps)}, kept {found.ref}")
            explorer.restore(found.ref)
            if gap == 0:
                break
        for root in vmm.snapshots.tree():
            print(*root.lines(), sep="\n")
        for snapshot in vmm.snapshots.list(tag="best"):
            vmm.snapshots.remove(snapshot.ref)


if __name__ == "__main__":
    main()
