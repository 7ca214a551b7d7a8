"""A virtual identity: the names of system and host, and who programs think they are."""

from __future__ import annotations

import struct

from trivisor.vos.syscalls.builtin.files import Content, files
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy


def identity(
    policy: Policy,
    *,
    sysname: str = "Linux",
    nodename: str = "localhost",
    release: str = "6.1.0",
    version: str = "#1 SMP",
    machine: str | None = None,
    domainname: str = "(none)",
    os_release: str | None = None,
    uid: int | None = None,
    gid: int | None = None,
) -> None:
    """Have uname(2), and the files of /proc and /etc that say the same, tell of another system. Nothing shows of the real one.

    `machine` is the architecture as it is unless given; `os_release` is the text of /etc/os-release. `uid` and `gid` are what programs
    are told of themselves: what they may do stays as it is.
    """
    names = {"sysname": sysname, "nodename": nodename, "release": release, "version": version, "domainname": domainname}

    @policy.on("uname")
    def uname(call: Call) -> None:
        call.write_struct("buf", {**names, "machine": machine or call.machine})
        call.returns(0)

    shown: dict[str, Content] = {
        "/proc/sys/kernel/ostype": f"{sysname}\n",
        "/proc/sys/kernel/osrelease": f"{release}\n",
        "/proc/sys/kernel/version": f"{version}\n",
        "/proc/sys/kernel/hostname": f"{nodename}\n",
        "/proc/sys/kernel/domainname": f"{domainname}\n",
        "/proc/version": f"{sysname} version {release} {version}\n",
        "/etc/hostname": f"{nodename}\n",
    }
    if os_release is not None:
        shown |= {"/etc/os-release": os_release, "/usr/lib/os-release": os_release}
    if uid is not None or gid is not None:
        # As on a system without user namespaces: every id is itself.
        shown |= dict.fromkeys(("/proc/self/uid_map", "/proc/self/gid_map"), "         0          0 4294967295\n")
    files(policy, shown)
    for kind, number in (("uid", uid), ("gid", gid)):
        if number is not None:
            _told(policy, kind, number)


def _told(policy: Policy, kind: str, number: int) -> None:
    """Have programs told that all their ids of this kind are `number`."""
    policy.returns(f"get{kind}", number)
    policy.returns(f"gete{kind}", number)

    @policy.on(f"getres{kind}")
    def three(call: Call) -> None:
        for address in call.args[:3]:
            call.write_at(address, struct.pack("<I", number))
        call.returns(0)
