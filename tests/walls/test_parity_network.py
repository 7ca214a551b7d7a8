"""`vm.network` behind every wall: ports that come and go, shapes, cuts and captures, while the machine runs."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, EngineError, HostLacks, InvalidSpec, InvalidState, Machine, NotFound
from trivisor.core.errors import AlreadyExists
from trivisor.core.network import Egress, Shape
from trivisor.core.spec import Wall
from trivisor.launch.net import provide

BOUND = 60.0
BEYOND = "tvegress"
SERVE = """\
import socket, threading
server = socket.create_server(("0.0.0.0", 80))
print("ready", flush=True)
def talk(client):
    with client:
        while data := client.recv(100):
            client.sendall(data)
while True:
    threading.Thread(target=talk, args=server.accept()[:1], daemon=True).start()
"""
CONNECT = """\
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 80), timeout=float(sys.argv[2])) as client:
        client.sendall(b"hello")
        print(client.recv(100).decode())
except OSError as error:
    print("no:", error)
"""


@pytest.fixture(scope="module")
def pair(wall_home: VmHome, wall: Wall) -> Iterator[tuple[Machine, Machine]]:
    """Two machines of one named network that echo on port 80."""
    if why := provide.possible():
        pytest.skip(f"needs root: {why}")
    with VMM(wall_home.root) as vmm:
        both = tuple(vmm.create("debian", wall=wall, network="shaped", name=name) for name in ("one", "two"))
        try:
            for machine in both:
                machine.start()
                assert machine.spawn(["python3", "-c", SERVE], detach=True).stdout.readline() == b"ready\n"
            yield both[0], both[1]
        finally:
            for machine in both:
                machine.delete(force=True)


@pytest.fixture
def beyond() -> Iterator[str]:
    """The address of another host, a network namespace, that echoes on ports 80 and 81."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip(8), to make another host")
    subprocess.run(["ip", "netns", "add", BEYOND], check=True)
    try:
        for command in (
            f"ip link add tvegress0 type veth peer name tvegress1 netns {BEYOND}",
            "ip addr add 198.51.100.9/30 dev tvegress0",
            "ip link set tvegress0 up",
            f"ip -n {BEYOND} addr add 198.51.100.10/30 dev tvegress1",
            f"ip -n {BEYOND} link set tvegress1 up",
        ):
            subprocess.run(command.split(), check=True)
        serve = ["ip", "netns", "exec", BEYOND, sys.executable, "-c", SERVE]
        with subprocess.Popen(serve, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == b"ready\n"
                yield "198.51.100.10"
            finally:
                server.kill()
    finally:
        # The namespace takes its end of the pair down some time later, when the next test may make it again.
        subprocess.run(["ip", "link", "delete", "tvegress0"], check=False)
        subprocess.run(["ip", "netns", "delete", BEYOND], check=True)


def said(port: int, text: bytes = b"hello") -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=BOUND) as client:
        client.sendall(text)
        return client.recv(100)


def tried(machine: Machine, name: str, patience: float = 20) -> str:
    return machine.exec(["python3", "-c", CONNECT, name, str(patience)], timeout=BOUND).text.strip()


def refused(machine: Machine, name: str) -> bool:
    """Whether it is not reached; what is dropped is not waited for long."""
    return tried(machine, name, 1).startswith("no:")


def bindable(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_ports_come_and_go_while_it_runs(pair: tuple[Machine, Machine]) -> None:
    machine, other = pair
    port = machine.network.publish(80)
    assert said(port) == b"hello"
    assert machine.network.ports == machine.spec.ports == {port: 80}
    with pytest.raises(AlreadyExists):
        machine.network.publish(81, port)
    with pytest.raises(EngineError, match="is taken"):
        other.network.publish(80, port)
    assert not other.network.ports
    with socket.create_connection(("127.0.0.1", port), timeout=BOUND) as client:
        client.sendall(b"still")
        assert client.recv(100) == b"still"
        machine.network.withdraw(port)
        assert client.recv(100) == b""  # its connections have ended
    assert bindable(port)
    with pytest.raises(NotFound, match="not published"):
        machine.network.withdraw(port)
    for many in [machine.network.publish(80) for _ in range(5)]:
        assert said(many) == b"hello"
        machine.network.withdraw(many)


def test_machines_are_cut_off_from_each_other_and_joined_again(pair: tuple[Machine, Machine]) -> None:
    one, two = pair
    assert tried(one, "two") == tried(two, "one") == "hello"
    one.network.cut("two")
    assert one.network.cut_off == ("two",) and two.network.cut_off == ("one",)
    assert refused(one, "two") and refused(two, "one")
    two.network.join("one")
    assert tried(one, "two") == tried(two, "one") == "hello"
    assert not one.spec.cut and not two.spec.cut
    with pytest.raises(NotFound):
        one.network.cut("three")
    with pytest.raises(InvalidSpec):
        one.network.cut("one")


def test_what_comes_in_waits_or_is_lost(pair: tuple[Machine, Machine]) -> None:
    machine, other = pair
    port = machine.network.publish(80)
    machine.network.reshape(rate_in="256K")
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=BOUND) as client:
        for _ in range(6):  # 64 KiB may come at once
            client.sendall(bytes(32768))
            left = 32768
            while left:
                left -= len(client.recv(left))
    assert 0.3 < time.monotonic() - begun < BOUND
    try:
        machine.network.reshape(latency="200ms")
    except HostLacks as error:
        assert "sch_netem" in str(error)  # a kernel without; what held before holds on
        assert machine.network.shape == Shape(rate_in=256 << 10)
    else:
        begun = time.monotonic()
        assert said(port) == b"hello"
        assert time.monotonic() - begun > 0.35
    machine.network.reshape(loss=1)
    assert machine.network.shape == Shape(loss=1)
    assert refused(machine, other.network.address)
    machine.network.reshape()
    assert machine.spec.shape is None
    assert said(port) == b"hello"
    machine.network.withdraw(port)


def test_it_reaches_what_its_policy_allows_and_nothing_else(pair: tuple[Machine, Machine], beyond: str) -> None:
    machine, _ = pair
    port = machine.network.publish(80)
    assert tried(machine, beyond) == "hello"
    machine.network.restrict(f"{beyond}:443")
    with machine.network.decisions() as decisions:
        assert refused(machine, beyond)
        found = decisions.read(BOUND)
        assert found is not None and (found.allowed, found.protocol, found.address, found.port) == (False, "tcp", beyond, 80)
        machine.network.restrict("dns", "198.51.100.8/30:80-90")
        assert tried(machine, beyond) == "hello"
        while not (found := decisions.read(BOUND)).allowed:  # type: ignore[union-attr]
            continue
        assert (found.protocol, found.address, found.port) == ("tcp", beyond, 80)  # type: ignore[union-attr]
    assert machine.network.egress == machine.spec.egress == Egress(("dns", "198.51.100.8/30:80-90"))
    # Its links' ends on the host, by which all goes, take no IPv6, whatever its own kernel says.
    assert "trv" in Path("/proc/net/dev").read_text() and "trv" not in Path("/proc/net/if_inet6").read_text()
    machine.network.restrict("dns")
    assert refused(machine, beyond)
    assert tried(machine, "two") == "hello" and said(port) == b"hello"  # its network's members, and who asks it
    machine.network.restrict("pypi.example", "198.51.100.8/30:81")  # by name, and an address
    assert refused(machine, beyond) and tried(machine, "two") == "hello" and said(port) == b"hello"
    machine.network.unrestrict()
    assert tried(machine, beyond) == "hello"
    machine.network.withdraw(port)


def test_packets_are_captured(pair: tuple[Machine, Machine], tmp_path: Path) -> None:
    machine, _ = pair
    with machine.network.capture(tmp_path / "all.pcap") as capture:
        port = machine.network.publish(80)
        assert said(port, b"seen on the way") == b"seen on the way"
    data = (tmp_path / "all.pcap").read_bytes()
    assert struct.unpack_from("<IHHiIII", data) == (0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
    at, count = 24, 0
    carried: set[bytes] = set()
    while at < len(data):
        seconds, _, kept, length = struct.unpack_from("<IIII", data, at)
        assert kept == length and abs(time.time() - seconds) < BOUND
        packet = data[at + 16 : at + 16 + kept]
        if b"seen on the way" in packet:
            carried.add(packet[34:42])  # ports and sequence number: what comes late is sent again
        at, count = at + 16 + kept, count + 1
    assert len(carried) == 2 and count == capture.packets and capture.dropped == 0
    with machine.network.capture(tmp_path / "some.pcap", snaplen=64, most=500) as capture:
        for _ in range(5):
            assert said(port, bytes(100)) == bytes(100)
    assert (tmp_path / "some.pcap").stat().st_size <= 500
    assert 0 < capture.packets < 8 and capture.dropped > 0
    machine.network.withdraw(port)


def test_it_holds_after_a_stop_and_a_start(pair: tuple[Machine, Machine], tmp_path: Path) -> None:
    one, two = pair
    begun = 0
    while seen := two._context.records.events(begun):
        begun = seen[-1].id
    port = two.network.publish(80)
    two.network.reshape(loss=0.01)
    one.network.cut("two")
    capture = two.network.capture(tmp_path / "end.pcap")
    two.stop(0)
    with pytest.raises(InvalidState):
        two.network.capture(tmp_path / "none.pcap")
    assert bindable(port)
    later = two.network.publish(80)  # while it is stopped
    two.network.withdraw(port)
    two.start()
    assert two.spawn(["python3", "-c", SERVE], detach=True).stdout.readline() == b"ready\n"
    assert said(later) == b"hello" and bindable(port)
    assert two.network.shape == Shape(loss=0.01)
    assert refused(one, "two") and refused(two, "one")
    one.network.join("two")
    two.network.reshape()
    assert tried(one, "two") == "hello"
    two.network.withdraw(later)
    capture.close()
    assert [event.kind for event in two._context.records.events(begun) if event.machine == two.id].count("network") >= 6


@pytest.mark.usefixtures("wall")
def test_without_a_network_nothing_of_it_can_be_changed(running: Machine, tmp_path: Path) -> None:
    for change in (
        lambda: running.network.publish(80),
        lambda: running.network.reshape(loss=0.5),
        lambda: running.network.cut("two"),
        lambda: running.network.restrict(),
        lambda: running.network.restrict(["pypi.example"]),  # type: ignore[arg-type]
        lambda: running.network.decisions(),
        lambda: running.network.capture(tmp_path / "none.pcap"),
    ):
        with pytest.raises((InvalidSpec, NotFound)):
            change()
    with pytest.raises(InvalidSpec):
        running.network.publish(0)
    with pytest.raises(InvalidSpec):
        running.network.reshape(colour="red")
