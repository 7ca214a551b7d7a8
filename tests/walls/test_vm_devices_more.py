"""Serial ports, network cards, shared folders and watchdogs that a running machine is given, and every kind again and again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, Machine
from trivisor.core.errors import AlreadyExists, HostLacks, InvalidSpec
from trivisor.core.spec import Wall
from trivisor.vmm.plugged import links
from trivisor.vos.devices import (
    BlockDevice,
    CharDevice,
    Disk,
    Keyboard,
    NetworkCard,
    Random,
    Serial,
    SerialSocket,
    SharedFolder,
    UsbStorage,
    Watchdog,
)

pytestmark = [pytest.mark.slow, pytest.mark.walls("vm")]
ALONE = ("nvme", "random", "serial", "network", "folder", "watchdog", "block", "char")
USB = ("usb", "keyboard", "stick")
"""Half a second each: twenty times takes too long for all but `make soak`."""


class Zeros(BlockDevice):
    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


@pytest.fixture(scope="module")
def full(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    """One running machine for all kinds."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, kernel="full", ram="shared")
        try:
            machine.start()
        except HostLacks as error:
            machine.delete(force=True)
            pytest.skip(f"needs the full kernel: {error}")
        yield machine
        machine.delete(force=True)


@pytest.fixture
def machine(full: Machine) -> Iterator[Machine]:
    yield full
    for device in full.devices.list():
        full.devices.detach(device.name)


def taps(machine: Machine) -> set[int]:
    """The indexes of the interfaces of its cards, which the host gives to no other afterwards."""
    # Each by itself: a list of all may miss one when others come and go meanwhile, as they do on a host.
    return {socket.if_nametoindex(link.interface) for link in links(Path(machine.info()["folder"]))}


def gone(indexes: set[int]) -> bool:
    for index in indexes:
        with contextlib.suppress(OSError):
            socket.if_indextoname(index)
            return False
    return True


def test_a_serial_port_at_a_socket(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "port"
    machine.devices.attach(SerialSocket(path), "com")
    node = machine.devices.node("com")
    assert node == "/dev/ttyS4"
    assert path.stat().st_mode & 0o777 == 0o600
    for word in ("one", "two"):  # one caller after the other
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(20)
            caller.connect(str(path))
            reader = machine.spawn(f"exec 3<>{node}; stty -F {node} raw -echo; echo ready; head -c 3 <&3 | tee {node} >&2")
            assert reader.stdout.readline() == b"ready\n"
            caller.sendall(word.encode())
            with caller.makefile("rb") as said:
                assert said.read(3) == word.encode()
            assert reader.wait(20) == 0
    with pytest.raises(AlreadyExists, match="there is something"):
        machine.devices.attach(SerialSocket(path), "again")
    machine.devices.detach("com")
    assert not path.exists()
    assert [device.name for device in machine.devices.list()] == []


def test_a_serial_port_at_a_terminal_and_at_files(machine: Machine, tmp_path: Path) -> None:
    port = Serial()
    machine.devices.attach(port, "com")
    node = machine.devices.node("com")
    terminal = os.open(port.path, os.O_RDWR | os.O_NOCTTY)
    reader = machine.spawn(f"exec 3<>{node}; stty -F {node} raw -echo; echo ready; head -c 3 <&3; printf answer >&3")
    assert reader.stdout.readline() == b"ready\n"
    os.write(terminal, b"ask")
    assert reader.stdout.read(3) == b"ask"
    with open(terminal, "rb", buffering=0, closefd=False) as answers:
        assert b"".join(iter(lambda: answers.read(1), b"r")) == b"answe"
    assert reader.wait(20) == 0
    os.close(terminal)
    machine.devices.detach("com")
    with (tmp_path / "said").open("wb") as file:
        machine.devices.attach(Serial(file), "com")
        machine.exec(f"stty -F {node} raw -echo; printf words >{node}", check=True)
        wait(lambda: (tmp_path / "said").read_bytes() == b"words")
        machine.devices.detach("com")
        file.write(b" and more")  # it is still ours
    assert not port.faults
    with pytest.raises(InvalidSpec):
        Serial(object())  # type: ignore[arg-type]


def test_a_network_card(machine: Machine, wall_vmm: VMM) -> None:
    """It reaches another machine on the card's network, is known there by name, and leaves nothing."""
    machine.devices.attach(NetworkCard("blue", mac="52:54:00:aa:bb:cc"), "card")
    (tap,) = taps(machine)
    node = machine.devices.node("card")
    assert machine.files.read_text(f"{node}/address") == "52:54:00:aa:bb:cc\n"
    with pytest.raises(InvalidSpec, match="on blue already"):
        machine.devices.attach(NetworkCard("blue"), "other")
    other = wall_vmm.run("debian", wall="vm", network="blue")
    serve = "import socket; s = socket.create_server(('', 7)); print('up', flush=True); s.accept()[0].sendall(b'hello')"
    server = other.spawn(["python3", "-c", serve])
    assert server.stdout.readline() == b"up\n"
    address = other.info()["facts"]["address"]
    ask = f"import socket; print(socket.create_connection(('{address}', 7), 10).recv(5))"
    assert machine.exec(["python3", "-c", ask]).text == "b'hello'\n"
    assert other.exec(["python3", "-c", f"import socket; print(socket.gethostbyname('{machine.name}'))"]).exit_code == 0
    other.delete(force=True)
    machine.devices.detach("card")
    assert not machine.files.exists(str(node))
    assert gone({tap})


def test_a_card_and_a_policy_do_not_go_together(machine: Machine, wall_vmm: VMM) -> None:
    other = wall_vmm.create("debian", wall="vm", network="nat", egress=["10.0.0.0/8"])
    with pytest.raises(InvalidSpec, match="egress policy"):
        other.devices.attach(NetworkCard("blue"))
    plain = wall_vmm.create("debian", wall="vm", network="nat")
    plain.devices.attach(NetworkCard("blue"), "card")
    with pytest.raises(InvalidSpec, match="further network card"):
        plain.network.restrict("10.0.0.0/8")
    for network in ("none", "host", "No Name"):
        with pytest.raises(InvalidSpec):
            NetworkCard(network)
    for mac in ("52:54:00:aa:bb", "01:00:00:00:00:00", "x"):
        with pytest.raises(InvalidSpec):
            NetworkCard("blue", mac=mac)


def test_a_shared_folder(machine: Machine, running: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("shared")
    machine.devices.attach(SharedFolder(tmp_path, "/mnt/deep/shared"), "folder")
    assert machine.exec("cat /mnt/deep/shared/file; echo back >/mnt/deep/shared/new", check=True).text == "shared"
    assert (tmp_path / "new").read_text() == "back\n"
    with pytest.raises(InvalidSpec, match="already"):
        machine.devices.attach(SharedFolder(tmp_path, "/mnt/deep/shared"), "other")
    machine.devices.detach("folder")
    assert machine.exec("ls /mnt/deep/shared").text == ""
    machine.devices.attach(SharedFolder(tmp_path, "/mnt/fixed", readonly=True), "fixed")
    assert b"Read-only" in machine.exec("touch /mnt/fixed/x").stderr
    for place in ("relative", "/", "/a/../b"):
        with pytest.raises(InvalidSpec):
            SharedFolder(tmp_path, place)
    with pytest.raises(InvalidSpec, match="cannot be shared"):
        machine.devices.attach(SharedFolder(tmp_path / "none", "/mnt/x"))
    with pytest.raises(InvalidSpec, match="machine's memory"):
        running.devices.attach(SharedFolder(tmp_path, "/mnt/x"))


BARK = (
    "import fcntl, os, struct, time\n"
    "dog = os.open('/dev/watchdog0', os.O_WRONLY)\n"
    "fcntl.ioctl(dog, 0xC0045706, struct.pack('i', 1))\n"  # WDIOC_SETTIMEOUT, linux/watchdog.h
    "print('armed', flush=True)\n"
    "time.sleep(3600)\n"
)


@pytest.mark.parametrize("action", ["none", "pause"])
def test_a_watchdog_fires(machine: Machine, wall_vmm: VMM, action: str) -> None:
    machine.devices.attach(Watchdog(action), "dog")  # type: ignore[arg-type]
    assert machine.devices.node("dog") == "/dev/watchdog0"
    with pytest.raises(InvalidSpec, match="one watchdog"):
        machine.devices.attach(Watchdog(), "other")
    since = max(event.id for event in wall_vmm.events())
    program = machine.spawn(["python3", "-c", BARK])
    assert program.stdout.readline() == b"armed\n"
    event = next(event for event in wall_vmm.events(since, follow=True, timeout=30) if event.kind == "watchdog")
    assert (event.machine, event.detail) == (machine.id, f"its watchdog fired: {action}")
    if action == "pause":
        assert wall_vmm.get(machine.id).state == "paused"
        machine.resume()
    program.kill()
    program.wait(20)
    machine.exec(["python3", "-c", "open('/dev/watchdog0', 'w').write('V')"], check=True)
    assert len([event for event in wall_vmm.events(since) if event.kind == "watchdog"]) in (1, 2), "each time is written down once"


def test_a_watchdog_ends_a_machine(wall_vmm: VMM, full: Machine) -> None:
    machine = wall_vmm.create("debian", wall="vm", kernel="full")
    machine.devices.attach(Watchdog("reset"), "dog")
    machine.start()
    assert [(device.kind, device.plugged) for device in machine.devices.list()] == [("watchdog", True)]
    machine.spawn(["python3", "-c", BARK], detach=True)
    machine.wait(timeout=60)
    assert machine.state == "failed"
    assert machine.info()["reason"] == "its watchdog fired: reset"
    assert "watchdog" in {event.kind for event in wall_vmm.events() if event.machine == machine.id}


@pytest.mark.parametrize("bus", ["nvme", "usb"])
def test_limits_hold_at_each_bus(machine: Machine, tmp_path: Path, bus: str) -> None:
    """As many operations as it may do in 1.5 s, and as many bytes: reading, and writing to a qcow2."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    for given, command in (
        ({"iops": 20}, "if={} of=/dev/null bs=512 count=30 iflag=direct"),
        ({"bandwidth": "1M"}, "if=/dev/zero of={} bs=256K count=6 oflag=direct conv=fsync"),
    ):
        machine.devices.attach(Disk(path, bus=bus, **given), "few")  # type: ignore[arg-type]
        begun = time.monotonic()
        machine.exec(f"dd {command.format(machine.devices.node('few'))}", check=True)
        assert time.monotonic() - begun > 1, given
        machine.devices.detach("few")


def test_what_is_kept_is_there_at_the_next_start(wall_vmm: VMM, tmp_path: Path) -> None:
    """A card, a port and a folder of a machine that does not run are plugged when it starts, and gone when it has stopped."""
    machine = wall_vmm.create("debian", wall="vm", ram="shared")
    for device in (NetworkCard("blue"), SerialSocket(tmp_path / "port"), SharedFolder(tmp_path, "/mnt/kept")):
        assert not machine.devices.attach(device).plugged
    machine.start()
    assert [(device.name, device.plugged) for device in machine.devices.list()] == [
        ("network1", True),
        ("serial1", True),
        ("folder1", True),
    ]
    assert machine.exec("[ -e /mnt/kept/port ] && cat /proc/net/route | grep -c eth", check=True).text == "3\n", "it has no other network"
    (first,) = taps(machine)
    machine.stop()
    assert gone({first})
    assert not (tmp_path / "port").exists()
    assert [device.plugged for device in machine.devices.list()] == [False] * 3
    machine.start()
    (second,) = taps(machine)
    machine.devices.detach("network1")
    assert gone({second})
    machine.delete(force=True)


def device(kind: str, folder: Path) -> object:
    disk = folder / f"{kind}.raw"
    if kind in ("virtio", "nvme", "usb"):
        disk.write_bytes(bytes(1 << 20))
    made: dict[str, Callable[[], object]] = {
        "random": Random,
        "serial": lambda: SerialSocket(folder / "port"),
        "network": lambda: NetworkCard("blue"),
        "folder": lambda: SharedFolder(folder, "/mnt/again"),
        "watchdog": Watchdog,
        "block": lambda: Zeros(1 << 20, readonly=True),
        "char": CharDevice,
        "keyboard": Keyboard,
        "stick": lambda: UsbStorage(Zeros(1 << 20, readonly=True)),
    }
    return made[kind]() if kind in made else Disk(disk, bus=kind)  # type: ignore[arg-type]


def again(machine: Machine, folder: Path, kind: str, name: str) -> None:
    """Plug a device, which the guest has then, and pull it out."""
    machine.devices.attach(device(kind, folder), name)  # type: ignore[arg-type]
    node = machine.devices.node(name)
    assert kind == "random" or machine.files.exists(str(node))
    plugged = taps(machine) if kind == "network" else set()
    machine.devices.detach(name)
    assert gone(plugged)


def rounds(machine: Machine, folder: Path, kinds: Sequence[str], times: int) -> None:
    """Have each kind come and go so often, those of a round at once, since each mostly waits for the guest; no trace of them stays."""

    def there() -> str:
        return machine.exec("cd /sys; ls bus/pci/devices bus/usb/devices class/net class/tty class/virtio-ports block fs/virtiofs").text

    before = there()
    with ThreadPoolExecutor(len(kinds)) as pool:
        for _ in range(times):
            for done in [pool.submit(again, machine, folder, kind, f"again-{kind}") for kind in kinds]:
                done.result(120)
            assert machine.devices.list() == []
            wait(lambda: there() == before)  # of a USB device its node goes first, and then what it was made of


@pytest.fixture
def kinds(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest) -> Sequence[str]:
    """Those of a group that this host's QEMU has."""
    found = []
    for kind in request.param:
        try:
            again(machine, tmp_path, kind, "probe")
            found.append(kind)
        except HostLacks as error:
            assert kind in ("keyboard", "stick", "folder"), error  # a QEMU without usbredir, a host without virtiofsd
    return found


@pytest.mark.parametrize("kinds", [*zip(ALONE, strict=True)], ids=" ".join, indirect=True)
def test_each_kind_comes_and_goes_twenty_times(machine: Machine, tmp_path: Path, kinds: Sequence[str]) -> None:
    rounds(machine, tmp_path, kinds, 20)


@pytest.mark.parametrize("kinds", [USB], ids=["usb"], indirect=True)
def test_several_usb_devices_come_and_go_at_once(machine: Machine, tmp_path: Path, kinds: Sequence[str]) -> None:
    rounds(machine, tmp_path, kinds, 4)


@pytest.mark.soak
@pytest.mark.parametrize("kinds", [*zip((*ALONE, *USB), strict=True)], ids=" ".join, indirect=True)
def test_each_kind_comes_and_goes_a_hundred_times(machine: Machine, tmp_path: Path, kinds: Sequence[str]) -> None:
    rounds(machine, tmp_path, kinds, 100)


def wait(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # a file tells nobody that it has grown, nor that it has gone
