"""Runs in a virtual machine whose kernel has AppArmor: a container without and with a profile of the name that Docker's has.

The profile is made here, in the form in which the kernel takes it (security/apparmor/policy_unpack.c), since its compiler is rarely
installed: it only complains, so it shows that a container is under it and forbids nothing.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

from trivisor import VMM
from trivisor.vmm.engines.container import host

SECURITY = Path("/sys/kernel/security")
COMPLAIN = 1


def name(text: str) -> bytes:
    return struct.pack("<BH", 4, len(text) + 1) + text.encode() + b"\0"


def u32(value: int) -> bytes:
    return struct.pack("<BI", 2, value)


def struct_of(text: str, *parts: bytes) -> bytes:
    return name(text) + b"\7" + b"".join(parts) + b"\x08"


def profile(called: str) -> bytes:
    string = struct.pack("<BH", 5, len(called) + 1) + called.encode() + b"\0"
    flags = struct_of("flags", u32(0), u32(COMPLAIN), u32(0))
    return name("version") + u32(5) + struct_of("profile", string, flags, u32(0), u32(0), u32(0), u32(0))


def label(home: str) -> tuple[str, str]:
    """What PID 1 of a new container is under, and what the machine is said to lack."""
    with VMM(home) as vmm, vmm.run("host", wall="container") as machine:
        return machine.exec(["cat", "/proc/1/attr/current"], check=True).text.strip(), machine.info()["facts"].get("lacks", "")


if __name__ == "__main__":
    assert Path("/sys/module/apparmor/parameters/enabled").read_text() == "Y\n"
    if not (SECURITY / "apparmor").exists():
        subprocess.run(["mount", "-t", "securityfs", "none", SECURITY], check=True)
    found, lacks = label(sys.argv[1])
    assert found == "unconfined", found
    assert "AppArmor, which is on, but has no profile docker-default loaded" in lacks, lacks
    (SECURITY / "apparmor/.load").write_bytes(profile("docker-default"))
    host.apparmor.cache_clear()
    found, lacks = label(sys.argv[1])
    assert found == "docker-default (complain)", found
    assert "AppArmor" not in lacks, lacks
    print("all of it")
