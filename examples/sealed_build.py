"""A build that may write only under one folder and connect nowhere, with each refusal listed. `sealed_build.py [WALL]`."""

from __future__ import annotations

import sys

from trivisor import VMM, Machine, Policy
from trivisor.vos.syscalls.events import text
from trivisor.vos.syscalls.trace import Filter

WATCHED = ("open", "openat", "creat", "connect", "rename", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat")

BUILD = """
echo compiling > /build/out.txt
echo sneaky >> /etc/motd
cp /build/out.txt /usr/bin/ls
python3 -c 'import socket; socket.create_connection(("192.0.2.1", 443), 2)'
echo done >> /build/out.txt
"""


def sealed() -> Policy:
    """Return the policy: the kernel holds it, whatever the build does."""
    policy = Policy()
    policy.paths(write=["/build", "/tmp", "/dev"])
    policy.errno("connect", "EACCES")
    return policy


def build(vm: Machine) -> tuple[str, list[str]]:
    """Run the build, and return what it made and what it was refused."""
    vm.files.mkdir("/build", parents=True)
    refusals = Filter.make(errors=["EACCES", "EPERM"])
    with vm.syscalls.trace(["sh", "-c", BUILD], WATCHED, keep=refusals, policy=sealed()) as trace:
        refused = [text(event) for event in trace]
    return vm.files.read_text("/build/out.txt"), refused


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall=sys.argv[1] if len(sys.argv) > 1 else "container") as machine:
        made, refusals = build(machine)
        print(made, *refusals, sep="\n")
