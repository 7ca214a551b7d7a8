"""`make soak`: lives without end for $SECONDS_OF_SOAK seconds (default 600), two machines at a time, looking for what is left over.

Each round makes, starts, uses, pauses, stops or kills machines, as a seeded random chooses; then nothing of them may be left: no
process, folder, row, nor descriptor of ours. The seed is printed, and given again by $SEED.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.demo import IMAGE, folder_of, still_there, watched
from trivisor import VMM, TrivisorError
from trivisor.core.process import Who

AT_ONCE = 2


def life(vmm: VMM, dice: random.Random, name: str) -> list[str]:
    """Take one machine through a random life and return what is left of it."""
    vm = vmm.create(IMAGE, name=name, disk=dice.choice(["ram", "1G"]))
    folder = folder_of(vm).root
    processes: set[Who] = set()
    try:
        for _ in range(dice.randint(1, 3)):
            vm.start()
            processes |= watched(vm)
            payload = dice.randbytes(dice.randint(1, 1 << 20))
            vm.files.write("/root/blob", payload)
            if vm.exec(["cat", "/root/blob"]).stdout != payload:
                return [f"{name}: what was read is not what was written"]
            if dice.random() < 0.5:
                vm.pause()
                vm.resume()
            if dice.random() < 0.3:
                os.kill(int(folder_of(vm).keeper.read_text().split()[0]), signal.SIGKILL)
                vm.wait(timeout=30)
            else:
                vm.stop()
    finally:
        vm.delete(force=True)
    left = [f"{name}: process {who.pid}" for who in still_there(processes)]
    return left + ([f"{name}: {folder}"] if os.path.lexists(folder) else [])


def main() -> int:
    """Run until the time is up or something is left."""
    seconds = float(os.environ.get("SECONDS_OF_SOAK", "600"))
    seed = int(os.environ.get("SEED", str(random.randrange(1 << 32))))
    print(f"seed {seed}, {seconds:g} s", flush=True)
    dice = random.Random(seed)
    vmm = VMM()
    before = 0
    end = time.monotonic() + seconds
    done = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while time.monotonic() < end:
            lives = [pool.submit(life, vmm, random.Random(dice.random()), f"soak-{number}") for number in range(AT_ONCE)]
            left = [line for future in lives for line in future.result()]
            open_now = len(list(Path("/proc/self/fd").iterdir()))
            before = before or open_now  # the first round opens what stays open: the database
            if open_now > before + AT_ONCE:
                left.append(f"{open_now} descriptors, {before} after the first round")
            if left:
                print("\n".join(left))
                return 1
            done += AT_ONCE
            print(f"{done} lives, {open_now} descriptors", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrivisorError as error:
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(1)
