"""A program that talks to a server which is a Python function; the machine has no network at all. `fake_server.py [WALL]`."""

from __future__ import annotations

import sys

from trivisor import VMM, Machine, Policy
from trivisor.vos.syscalls.builtin import Connection, FakeNet

PROGRAM = """
import socket
for name in ("api.example.com", "evil.example.org"):
    try:
        with socket.create_connection((name, 80), 10) as s:
            s.sendall(b"GET /answer HTTP/1.0\\r\\nHost: " + name.encode() + b"\\r\\n\\r\\n")
            print(name, s.makefile("rb").read().split(b"\\r\\n\\r\\n")[1].decode())
    except OSError as error:
        print(name, "cannot be reached")
"""


def ask(vm: Machine) -> tuple[str, list[Connection]]:
    """Return what the program says, and every connection that it made."""
    policy = Policy()
    net = FakeNet(policy)

    @net.host("*.example.com", 80)
    def api(connection: Connection) -> None:
        request = connection.recv_until(b"\r\n\r\n")
        connection.send(b"HTTP/1.0 200 OK\r\n\r\n42 for " + request.split(b" ")[1])

    return vm.exec(["python3", "-c", PROGRAM], policy=policy, check=True).text, net.connections


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall=sys.argv[1] if len(sys.argv) > 1 else "container") as machine:
        said, connections = ask(machine)
        print(said, end="")
        for one in connections:
            print(f"{one.name}:{one.port}", f"{len(one.sent)} bytes asked, {len(one.received)} answered")
