"""A program that believes in another computer: its system, its date, its size, its random numbers. `another_world.py [WALL]`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from trivisor import VMM, Machine, Policy
from trivisor.vos.syscalls import builtin

LOOK_AROUND = """
import os, time
print(" ".join(os.uname()))
print(open("/etc/os-release").read().strip())
print(time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
print(os.cpu_count(), "processors,", open("/proc/meminfo").readline().strip())
print(os.urandom(4).hex())
"""


def world() -> Policy:
    """Return the policy that makes it."""
    policy = Policy()
    builtin.identity(policy, sysname="Atlantis", nodename="nautilus", release="20000.1", version="#7 LEAGUES", os_release="NAME=Atlantis\n")
    builtin.clock(policy, now=datetime(1999, 12, 31, 23, 59, tzinfo=UTC), frozen=True)
    builtin.limits(policy, memory=4 << 40, cpus=12)
    builtin.seeded(policy, seed=7)
    return policy


def look_around(vm: Machine) -> str:
    """Return what a program in the machine says of where it is."""
    return vm.exec(["python3", "-c", LOOK_AROUND], policy=world(), check=True).text


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall=sys.argv[1] if len(sys.argv) > 1 else "container") as machine:
        print(look_around(machine), end="")
