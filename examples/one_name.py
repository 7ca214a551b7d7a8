"""A package is fetched from the one name that the machine may reach; nothing else is reached. `one_name.py INDEX PACKAGE [WALL]`."""

from __future__ import annotations

import sys

from trivisor import VMM, Machine

FETCH = r"""
import re, socket, sys

def get(host, path, address=None):
    with socket.create_connection((address or host, 80), timeout=10) as server:
        server.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: server.recv(65536), b"")).partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise OSError("no such page")
    return body

index, package, *elsewhere = sys.argv[1:]
page = get(index, f"/simple/{package}/").decode()
link = re.search(r'href="([^"#]+)', page)[1]
data = get(index, link)
open("/tmp/" + link.rpartition("/")[2], "wb").write(data)
print("fetched", link.rpartition("/")[2], len(data))
for other in elsewhere:
    host, _, address = other.partition("@")
    try:
        get(host, "/", address)
        print("reached", other)
    except OSError as error:
        print("refused", other)
"""


def fetch(vm: Machine, index: str, package: str, elsewhere: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Fetch a package, and try to reach NAME or NAME@ADDRESS `elsewhere`. Return what the machine saw, and what was refused."""
    vm.network.restrict(index)
    refused = []
    with vm.network.decisions() as decisions:
        said = vm.exec(["python3", "-c", FETCH, index, package, *elsewhere], timeout=120, check=True).text.splitlines()
        while (decision := decisions.read(1)) is not None:
            if not decision.allowed:
                refused.append(f"{decision.protocol} {decision.name or decision.address}: {decision.reason}")
    return said, refused


if __name__ == "__main__":
    name, wanted, *wall = sys.argv[1:]
    with VMM() as vmm, vmm.run("debian", wall=wall[0] if wall else "container", network="nat", egress=[name]) as machine:
        seen, kept = fetch(machine, name, wanted, ("www.example.com",))
        print(*seen, *kept, sep="\n")
