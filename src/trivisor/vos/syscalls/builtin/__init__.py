"""Ready-made policies: ordinary rules and handlers, written to be read as examples.

Each function adds to a Policy, so that they go together:

    policy = Policy()
    identity(policy, release="9.9-future", nodename="atlantis")
    clock(policy, now=datetime(1999, 12, 31, 23, 59, tzinfo=UTC))
    files(policy, {"/etc/os-release": "NAME=Plan9"})

They change what programs see. None of them is a wall: a program that looks hard enough can tell.
"""

from trivisor.vos.syscalls.builtin.clock import clock
from trivisor.vos.syscalls.builtin.fakenet import Connection, FakeNet
from trivisor.vos.syscalls.builtin.files import files
from trivisor.vos.syscalls.builtin.identity import identity
from trivisor.vos.syscalls.builtin.limits import limits
from trivisor.vos.syscalls.builtin.random import seeded
from trivisor.vos.syscalls.builtin.system import system

__all__ = ["Connection", "FakeNet", "clock", "files", "identity", "limits", "seeded", "system"]
