"""Give a machine twice its memory and a second processor while a program runs in it, which counts on, and then uses both."""

from __future__ import annotations

from dataclasses import dataclass

from trivisor import VMM, Machine

PROGRAM = """
import os, sys, threading, time

count, held = 0, bytearray()

def counting():
    global count
    while True:
        count += 1
        time.sleep(0.01)

def work(processor):
    # A child that keeps one processor busy, and says whether it could have it.
    if (pid := os.fork()) == 0:
        try:
            os.sched_setaffinity(0, {processor})
            os._exit(sum(range(200_000)) < 0)
        except OSError:
            os._exit(1)
    return pid

threading.Thread(target=counting, daemon=True).start()
for line in sys.stdin:
    word, number = line.split()
    if word == "hold":
        held = bytearray(b"x") * (int(number) << 20)
    if word == "work":
        children = [work(processor) for processor in range(int(number))]
        print(sum(os.waitpid(pid, 0)[1] == 0 for pid in children), flush=True)
    else:
        print(len(held) >> 20, count, flush=True)
"""


@dataclass(frozen=True)
class Grown:
    """What the program said: how far it had counted before and after, how many MB it held then, how many processors it had."""

    plan: str
    before: int
    after: int
    held: int
    processors: tuple[int, int]


def grow(vm: Machine) -> Grown:
    """Take a machine from 256 MB and one vCPU to 512 MB and two under a running program."""
    program = vm.spawn(["python3", "-c", PROGRAM])

    def ask(line: str) -> list[int]:
        program.stdin.write(line.encode() + b"\n")
        return [int(word) for word in program.stdout.readline().split()]

    (alone,), (_, before) = ask("work 2"), ask("say 0")
    plan = vm.modify(memory="512M", cpus=2)
    (both,), (held, after) = ask("work 2"), ask("hold 320")
    program.kill()
    program.wait(10)
    return Grown(str(plan), before, after, held, (alone, both))


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall="vm", memory="256M", cpus=1) as machine:
        print(grow(machine))
        print(machine.memory.stats())
