"""Egress by name behind every wall: a machine that reaches the names it may, and nothing else, whatever it tries."""

from __future__ import annotations

import ssl
import struct
from collections.abc import Iterator

import pytest
from beyond import PYPI, RESOLVER, Beyond, beyond
from machine_home import VmHome

from trivisor import VMM, Machine
from trivisor.core.spec import Wall
from trivisor.launch.net import provide

BOUND = 60.0
WEB = """\
import socket, sys
def web(name, host, port=80, address=None, said=None):
    try:
        with socket.create_connection((address or name, port), timeout=5) as client:
            client.sendall(said or f"GET / HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
            return client.recv(4000).decode("latin-1") or "no: closed"
    except OSError as error:
        return f"no: {error}"
"""
PUMP = """\
import os, select, socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as client:
    while True:
        ready = select.select([0, client], [], [])[0]
        for one in ready:
            data = os.read(0, 65536) if one == 0 else client.recv(65536)
            if not data:
                sys.exit()
            if one == 0:
                client.sendall(data)
            else:
                os.write(1, data)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beyond]:
    if why := provide.possible():
        pytest.skip(f"needs root: {why}")
    with beyond(tmp_path_factory.mktemp("beyond")) as made:
        yield made


@pytest.fixture(scope="module")
def machine(wall_home: VmHome, wall: Wall, world: Beyond) -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provide, "resolvers", lambda: [RESOLVER])
        with VMM(wall_home.root) as vmm, vmm.run("debian", wall=wall, network="nat", name="named", egress=["pypi.example"]) as made:
            yield made


def asked(machine: Machine, call: str) -> str:
    """What a call of `web` gives in the machine."""
    return machine.exec(["python3", "-c", f"{WEB}\nprint({call})"], timeout=BOUND).text.strip()


def hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    outgoing = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError


def with_ech(plain: bytes) -> bytes:
    """Add an encrypted client hello (RFC 9849) to a hello: an extension, and all lengths around it."""
    extra = struct.pack(">HH", 0xFE0D, 8) + bytes(8)
    at = 5 + 4 + 2 + 32
    at += 1 + plain[at]
    at += 2 + int.from_bytes(plain[at : at + 2], "big")
    at += 1 + plain[at]
    extensions = int.from_bytes(plain[at : at + 2], "big") + len(extra)
    body = plain[9:at] + struct.pack(">H", extensions) + plain[at + 2 :] + extra
    return plain[:3] + struct.pack(">H", len(body) + 4) + b"\x01" + len(body).to_bytes(3, "big") + body


def secure(machine: Machine, world: Beyond, name: str, address: str = "") -> str:
    """A whole TLS connection to `name` (at `address`) from within the machine, whose certificate is checked."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = world.trusting.wrap_bio(incoming, outgoing, server_hostname=name)
    pump = machine.spawn(["python3", "-c", PUMP, address or name, "443"])

    def step(work: object) -> bytes:
        while True:
            try:
                done = work()  # type: ignore[operator]
            except ssl.SSLWantReadError:
                done = None
            if data := outgoing.read():
                pump.stdin.write(data)
            if done is not None or not (data := pump.stdout.read(65536)):
                return done if isinstance(done, bytes) else b""
            incoming.write(data)

    try:
        step(lambda: tls.do_handshake() or b"")
        if tls.version() is None:
            return "no: no handshake"
        tls.write(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        return step(lambda: tls.read(4000)).decode()
    finally:
        pump.kill()


def test_a_name_that_is_allowed_is_reached_and_no_other(machine: Machine, world: Beyond) -> None:
    with machine.network.decisions() as decisions:
        assert PYPI in asked(machine, 'web("pypi.example", "pypi.example")')
        assert asked(machine, 'web("other.example", "other.example")').startswith("no:")
        said = [decisions.read(BOUND) for _ in range(3)]
    assert [(one.allowed, one.protocol, one.name, one.address) for one in said if one] == [
        (True, "dns", "pypi.example", PYPI),
        (True, "tcp", "pypi.example", PYPI),
        (False, "dns", "other.example", ""),
    ]
    assert said[2] is not None and said[2].reason == "no rule allows this name"
    assert "1 pypi.example" in world.asked() and not any("other" in line for line in world.asked())


def test_tls_is_carried_as_it_is(machine: Machine, world: Beyond) -> None:
    assert f"{PYPI} GET / HTTP/1.1" in secure(machine, world, "pypi.example")
