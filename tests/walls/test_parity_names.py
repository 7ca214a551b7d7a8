"""Egress by name behind every wall: a machine that reaches the names it may, and nothing else, whatever it tries."""

from __future__ import annotations

import ssl
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from beyond import FILES, HOST, OTHER, PYPI, RESOLVER, Beyond, beyond
from machine_home import VmHome

from trivisor import VMM, InvalidSpec, Machine
from trivisor.core.network import Egress
from trivisor.core.spec import Wall
from trivisor.launch.net import provide

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import one_name

BOUND = 60.0
WEB = """\
import socket, sys
def web(name, host, port=80, address=None, said=None):
    try:
        with socket.create_connection((address or name, port), timeout=20) as client:
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


def test_a_package_is_fetched_from_one_name_and_nothing_else_is_reached(machine: Machine, world: Beyond) -> None:
    before = len(world.asked())
    elsewhere = ("other.example", f"pypi.example@{OTHER}", f"other.example@{PYPI}")
    said, refused = one_name.fetch(machine, "pypi.example", "thing", elsewhere)
    assert said == ["fetched thing-1.0.tar.gz 100000", *(f"refused {place}" for place in elsewhere)]
    assert list(dict.fromkeys(refused)) == [  # a resolver asks twice, and again if it waited long
        "dns other.example: no rule allows this name",
        f"tcp {OTHER}: an address that was not given for any name",
        "tcp other.example: no rule allows this name and port",
    ]
    assert set(world.asked()[before:]) == {"1 pypi.example"}
    with VMM(machine._context.home.root) as vmm:
        kept = [event.detail for event in vmm.events() if event.kind == "egress" and event.machine == machine.id]
        assert kept == [
            "refused dns other.example: no rule allows this name",
            f"refused tcp {OTHER}:80: an address that was not given for any name",
            f"refused tcp other.example {PYPI}:80: no rule allows this name and port",
        ]


@pytest.mark.walls("container")
def test_what_is_decided_is_said(machine: Machine) -> None:
    machine.network.restrict("pypi.example")
    with machine.network.decisions() as decisions:
        assert PYPI in asked(machine, 'web("pypi.example", "pypi.example")')
        assert asked(machine, 'web("other.example", "other.example")').startswith("no:")
        said = [decisions.read(BOUND) for _ in range(3)]
    assert [(one.allowed, one.protocol, one.name, one.address) for one in said if one] == [
        (True, "dns", "pypi.example", PYPI),
        (True, "tcp", "pypi.example", PYPI),
        (False, "dns", "other.example", ""),
    ]


@pytest.mark.walls("container")
def test_tls_is_carried_as_it_is(machine: Machine, world: Beyond) -> None:
    assert f"{PYPI} GET / HTTP/1.1" in secure(machine, world, "pypi.example")


@pytest.mark.walls("container")
def test_a_wildcard_allows_what_is_beneath_it(machine: Machine) -> None:
    machine.network.restrict("*.files.example:80", "pypi.example:80")
    assert FILES in asked(machine, 'web("a.files.example", "a.files.example")')
    assert FILES in asked(machine, 'web("deep.a.files.example", "DEEP.a.files.example:80")')
    assert asked(machine, 'web("files.example", "files.example")').startswith("no:")
    assert asked(machine, 'web("a.files.example", "a.files.example", 8080)').startswith("no:")


@pytest.mark.walls("container")
def test_addresses_that_no_name_gave_are_refused(machine: Machine) -> None:
    machine.network.restrict("pypi.example", "*.files.example")
    with machine.network.decisions() as decisions:
        assert asked(machine, f'web("{OTHER}", "pypi.example")').startswith("no:")
        assert (one := decisions.read(BOUND)) and not one.allowed and one.reason == "an address that was not given for any name"
        assert asked(machine, f'web("{HOST}", "pypi.example")').startswith("no:")  # the host itself
        # The right address, and the name of another that is allowed, too.
        calls = f'web("pypi.example", "pypi.example"), web("a.files.example", "pypi.example"), web("{PYPI}", "evil.example")'
        first, *rest = asked(machine, f'"|".join([{calls}])').split("|")
        assert PYPI in first and all(line.startswith("no:") for line in rest)
        said = []
        while (decision := decisions.read(1)) is not None:
            said.append(decision.reason)
    assert "an address that was not given for this name" in said and "no rule allows this name and port" in said


def test_hellos_that_do_not_say_whom_they_are_for_are_refused(machine: Machine) -> None:
    machine.network.restrict("pypi.example", "*.files.example")
    hellos = [hello("pypi.example"), hello("a.files.example"), hello("evil.example"), hello(None), with_ech(hello("pypi.example"))]
    calls = ", ".join(f'web("pypi.example", "", 443, said={said!r})[:3]' for said in [*hellos, b"SSH-2.0-x\r\n", b"\x00" * 20])
    with machine.network.decisions() as decisions:
        found = machine.exec(["python3", "-c", f"{WEB}\nprint([{calls}])"], timeout=BOUND).text
        reasons = []
        while (decision := decisions.read(1)) is not None:
            if decision.protocol == "tcp":
                reasons.append(decision.reason)
    assert found.strip() == repr(["\x16\x03\x03"] + ["no:"] * 6)
    assert reasons[0] == "" and reasons[3:] == [
        "a client hello without a server name",
        "an encrypted client hello",
        "neither TLS nor HTTP",
        "neither TLS nor HTTP",
    ]


@pytest.mark.walls("container")
def test_all_but_tcp_is_refused(machine: Machine, world: Beyond) -> None:
    machine.network.restrict("pypi.example")
    code = f"""{WEB}
def udp(address, port, data, family=socket.AF_INET, patience=0.7):
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(patience)
        try:
            client.sendto(data, (address, port))
            return client.recv(5000)
        except OSError as error:
            return b"no:"
def name(kind):
    return b"\\x12\\x34\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x04pypi\\x07example\\0" + bytes([0, kind, 0, 1])
def over_tcp(kind):
    with socket.create_connection(("9.9.9.9", 53), timeout=20) as client:
        client.sendall(len(name(kind)).to_bytes(2, "big") + name(kind))
        return client.recv(600)[2:]
print(web("pypi.example", "pypi.example")[:12])
quic = bytes([0xc3, 0, 0, 0, 1, 2, 7, 7, 1, 9, 0, 0])
print(udp("{PYPI}", 443, quic), udp("{PYPI}", 443, bytes(4000)), udp("::1", 443, b"x", socket.AF_INET6))
answers = over_tcp(1), udp("9.9.9.9", 53, name(1), patience=20), over_tcp(28), over_tcp(65), over_tcp(16)
print([(len(answer), answer[-4:] == socket.inet_aton("{PYPI}"), answer[3] & 15) for answer in answers])
"""
    lines = machine.exec(["python3", "-c", code], timeout=BOUND).text.splitlines()
    assert lines == [
        "HTTP/1.1 200",
        "b'no:' b'no:' b'no:'",
        "[(46, True, 0), (46, True, 0), (30, False, 0), (30, False, 0), (30, False, 0)]",
    ]
    assert {line.split()[0] for line in world.asked()} == {"1"}  # nothing but addresses is ever asked for


@pytest.mark.walls("container")
def test_a_name_with_a_private_address_is_not_followed(machine: Machine) -> None:
    machine.network.restrict("inner.example", "half.example", "self.example")
    with machine.network.decisions() as decisions:
        assert asked(machine, 'web("inner.example", "inner.example")').startswith("no:")
        found = [decisions.read(BOUND) for _ in range(3)]
        assert {one.address for one in found if one} == {"10.99.0.1", "127.0.0.1", "169.254.169.254"}
        assert {one.reason for one in found if one} == {"the name has a private address"}
        assert PYPI in asked(machine, 'web("half.example", "half.example")')
        assert asked(machine, 'web("self.example", "self.example")').startswith("no:")  # the host's own
        said = []
        while (decision := decisions.read(1)) is not None:
            said.append(decision.reason)
    assert "an address of the host" in said
    machine.network.restrict("inner.example", "10.99.0.0/24:80")
    assert "10.99.0.1" in machine.exec(["python3", "-c", "import socket; print(socket.gethostbyname('inner.example'))"]).text


@pytest.mark.walls("container")
def test_a_changed_policy_ends_what_it_does_not_allow(machine: Machine) -> None:
    machine.network.restrict("pypi.example", "other.example:22/tcp")
    open_one = f"""{WEB}
def opened(name, port):
    client = socket.create_connection((name, port), timeout=20)
    client.sendall(f"GET / HTTP/1.1\\r\\nHost: {{name}}\\r\\n\\r\\n".encode())
    print(heard(client, f" {{name}}\\r\\n\\r\\n".encode())[:8].decode(), flush=True)
    return client
def heard(client, end):
    data = b""
    while not data.endswith(end) and (part := client.recv(4000)):
        data += part
    return data
def state(client):
    try:
        client.sendall(b"echo")
        return "open" if heard(client, b" echo").endswith(b" echo") else "ended"
    except OSError:
        return "cut"
first, second = opened("pypi.example", 80), opened("other.example", 22)
for line in sys.stdin:
    print(state(first), state(second), flush=True)
"""
    program = machine.spawn(["python3", "-c", open_one])
    assert [program.stdout.readline().strip() for _ in range(2)] == [b"HTTP/1.1", b"SSH-2.0-"]

    def states() -> str:
        program.stdin.write(b"\n")
        return bytes(program.stdout.readline()).decode().strip()

    assert states() == "open open"
    machine.network.restrict("pypi.example", "other.example")  # no longer unseen
    assert states() == "open cut"
    machine.network.unrestrict()
    assert states() == "open cut"
    machine.network.restrict("other.example")
    assert states() == "cut cut"
    program.kill()
    assert asked(machine, 'web("pypi.example", "pypi.example")').startswith("no:")
    machine.network.unrestrict()
    assert OTHER in asked(machine, f'web("{OTHER}", "whoever")')


@pytest.mark.walls("container")
def test_a_policy_of_names_is_kept(machine: Machine) -> None:
    machine.network.restrict("PyPI.example")
    assert machine.network.egress == machine.spec.egress == Egress(("pypi.example",))
    for wish in ("pypi", "*.example"):  # all of a top-level domain is nobody's name
        with pytest.raises(InvalidSpec, match="no name"):
            machine.network.restrict(wish)
    assert machine.network.egress == Egress(("pypi.example",))
