"""What an egress policy takes from a download: a part of bench/hardware.py, as root.

The server is in a network namespace of the bench's own, at a public address that nobody has (RFC 7450, given up), since a name is never
given a private one; so is the resolver, which the machine's helper asks instead of the host's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from bench.common import Row, Series, row
from trivisor import VMM, Machine
from trivisor.core.spec import Wall
from trivisor.core.units import MIB
from trivisor.launch.net import provide

IMAGE = "debian"
SPACE = "tvbench"
HOST, SERVER = "192.52.193.1", "192.52.193.2"
NAME = "files.bench.example"
SIZES: dict[Wall, int] = {"container": 256 * MIB, "gvisor": 64 * MIB, "vm": 32 * MIB}
SLOWER = 1.25
"""0.8 of the speed."""

SERVE = r"""
import socket, sys, threading
def names():
    asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asked.bind(("0.0.0.0", 53))
    print("ready", flush=True)
    while True:
        query, peer = asked.recvfrom(2000)
        end = query.index(0, 12) + 5
        record = b"\xc0\x0c\0\1\0\1\0\0\1\0\0\4" + socket.inet_aton(sys.argv[1])
        asked.sendto(query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:end] + record, peer)
def give(client):
    with client:
        if request := client.recv(65536):
            size = int(request.split()[1][1:])
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(size >> 20):
                client.sendall(block)
block = bytes(1 << 20)
web = socket.create_server(("0.0.0.0", 80))
threading.Thread(target=names, daemon=True).start()
while True:
    threading.Thread(target=give, args=web.accept()[:1], daemon=True).start()
"""
GET = r"""
import socket, sys, time
server, left, buffer = sys.argv[1], int(sys.argv[2]), bytearray(1 << 20)
begun = time.perf_counter()
with socket.create_connection((server, 80)) as client:
    client.sendall(b"GET /%d HTTP/1.1\r\nHost: %s\r\n\r\n" % (left, server.encode()))
    while left > 0 and (got := client.recv_into(buffer)):
        left -= got
print((time.perf_counter() - begun) * 1000)
"""


def rows(quick: bool) -> list[Row]:
    """Download behind each wall that is there, with each policy in turn, so that what else the host does hits all alike."""
    if os.geteuid() or not shutil.which("ip"):
        return []
    made: list[Row] = []
    with _server(), mock.patch.object(provide, "resolvers", lambda: [SERVER]), VMM() as vmm:
        there = [wall.wall for wall in vmm.walls() if wall.available]
        for wall, size in SIZES.items():
            if wall in there:
                with vmm.run(IMAGE, wall=wall, network="nat") as machine:
                    made += _downloads(machine, size, 5 if quick else 15)
    return made


def _downloads(machine: Machine, size: int, rounds: int) -> list[Row]:
    policies = {"": None, "by address": ("dns", f"{SERVER}:80"), "of 250 addresses": _many(), "by name": (NAME,)}
    taken = {what: Series() for what in policies}
    for _ in range(rounds):
        for what, policy in policies.items():
            if policy is None:
                machine.network.unrestrict()
            else:
                machine.network.restrict(*policy)
            taken[what].values.append(_download(machine, size))
    without = taken.pop("")
    name = f"HTTP download of {size // MIB} MB, {machine.wall}, egress policy"
    return [row(f"{name} {what}", series, "ms", peer="no policy", against=without, share=SLOWER) for what, series in taken.items()]


def _many() -> tuple[str, ...]:
    return ("dns", *(f"198.51.{number}.0/24:80-90" for number in range(250)), f"{SERVER}:80")


def _download(machine: Machine, size: int) -> float:
    return float(machine.exec(["python3", "-c", GET, NAME, str(size)], timeout=120, check=True).text)


@contextmanager
def _server() -> Iterator[None]:
    subprocess.run(["ip", "netns", "add", SPACE], check=True)
    try:
        for command in (
            f"ip link add {SPACE}0 type veth peer name {SPACE}1 netns {SPACE}",
            f"ip addr add {HOST}/24 dev {SPACE}0",
            f"ip link set {SPACE}0 up",
            f"ip -n {SPACE} addr add {SERVER}/24 dev {SPACE}1",
            f"ip -n {SPACE} link set {SPACE}1 up",
        ):
            subprocess.run(command.split(), check=True)
        serve = ["ip", "netns", "exec", SPACE, sys.executable, "-c", SERVE, SERVER]
        with subprocess.Popen(serve, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                yield
            finally:
                server.kill()
    finally:
        subprocess.run(["ip", "netns", "delete", SPACE], check=True)
