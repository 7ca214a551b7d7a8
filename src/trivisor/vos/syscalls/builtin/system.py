"""What the programs that manage a system call, and a container refuses: safe kinds of mknod and mount.

Both are carried out for the program by the machine's answerer (`call.mknod`, `call.mount`), with what was copied and with no more rights
than the machine's own user namespace has: enforcement, not observation.
"""

from __future__ import annotations

import errno

from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

FILESYSTEMS = frozenset({"tmpfs", "ramfs", "proc", "sysfs", "devpts", "mqueue", "overlay", "cgroup2"})
"""File systems that Linux lets a user namespace mount."""
_WITHOUT_TYPE = 0x1000 | 0x20 | 0x2000 | 0x100000 | 0x40000 | 0x80000 | 0x20000
"""MS_BIND, MS_REMOUNT, MS_MOVE, MS_SHARED, MS_PRIVATE, MS_SLAVE, MS_UNBINDABLE: no file system is opened (mount(2))."""


def system(policy: Policy, *, filesystems: frozenset[str] = FILESYSTEMS) -> None:
    """Let programs make the usual device nodes, and mount `filesystems` and what is mounted already."""

    @policy.on("mknod", "mknodat", enforces=True)
    def mknod(call: Call) -> None:
        call.mknod()

    @policy.on("mount", enforces=True)
    def mount(call: Call) -> None:
        kind = call.string(call.args[2]).decode("utf-8", "replace") if call.args[2] else ""
        if call.arg("mountflags") & _WITHOUT_TYPE or kind in filesystems:
            call.mount()
        else:
            call.errno(errno.EPERM)
