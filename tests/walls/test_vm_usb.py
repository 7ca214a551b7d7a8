"""USB devices and NVMe drives in a virtual machine with the full kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from migrating import until

from trivisor import VMM, Machine
from trivisor.core.errors import HostLacks, InvalidSpec
from trivisor.core.spec import Wall
from trivisor.vos.devices import Disk, Keyboard, Mouse, Tablet

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bad_sectors
import usb_serial

pytestmark = [pytest.mark.slow, pytest.mark.walls("vm")]


@pytest.fixture(scope="module")
def full(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    """One running machine with the full kernel."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, kernel="full")
        try:
            machine.start()
        except HostLacks as error:
            machine.delete(force=True)
            pytest.skip(f"needs the full kernel: {error}")
        yield machine
        machine.delete(force=True)


def test_the_kernel_is_the_generic_one(full: Machine) -> None:
    assert not full.exec(["uname", "-r"]).text.strip().endswith("cloud-amd64")


@pytest.fixture(scope="module")
def redirecting(full: Machine) -> Machine:
    """The same, where QEMU can redirect USB."""
    try:
        full.devices.attach(Keyboard(), "probe")
    except HostLacks as error:
        pytest.skip(f"needs a QEMU with USB redirection: {error}")
    full.devices.detach("probe")
    return full


def test_a_serial_adapter_of_sixty_lines(redirecting: Machine) -> None:
    assert len(Path(str(usb_serial.__file__)).read_text().splitlines()) <= 66
    assert usb_serial.talk(redirecting) == "Shouting serial adapter\nHELLO\n"


def test_it_comes_and_goes(redirecting: Machine) -> None:
    button = Keyboard()
    for _ in range(4):
        redirecting.devices.attach(button, "button")
        node = redirecting.devices.node("button")
        assert redirecting.files.read_text(f"{node}/serial") == "button\n"
        redirecting.devices.detach("button")
        assert not redirecting.files.exists(str(node))
    assert not button.faults


def test_input(redirecting: Machine) -> None:
    """What is typed and pointed at is what a program in the guest reads from /dev/input (input_event, linux/input.h)."""
    keyboard, mouse, tablet = Keyboard(), Mouse(), Tablet()
    for device, name in ((keyboard, "keyboard"), (mouse, "mouse"), (tablet, "tablet")):
        redirecting.devices.attach(device, name)
    script = (
        "import glob, struct, sys, time\n"
        "where = {}\n"
        "while len(where) < 3:\n"
        "    for p in glob.glob('/sys/class/input/event*/device/name'):\n"
        "        where[open(p).read().split()[-1]] = '/dev/input/' + p.split('/')[4]\n"
        "files = [open(where[name], 'rb') for name in ('Keyboard', 'Mouse', 'Tablet')]\n"
        "print('ready')\n"
        "for f, most in zip(files, (6, 2, 2)):\n"
        "    seen = []\n"
        "    while len(seen) < most:\n"
        "        kind, code, value = struct.unpack('16xHHi', f.read(24))\n"
        "        if kind in (1, 2, 3) and (kind, value) != (1, 2): seen.append((kind, code, value))\n"  # not a key that is held for long
        "    print(seen)\n"
    )
    reader = redirecting.spawn(["python3", "-uc", script])
    assert reader.stdout.readline() == b"ready\n"
    keyboard.type("aB")
    assert reader.stdout.readline() == b"[(1, 30, 1), (1, 30, 0), (1, 42, 1), (1, 48, 1), (1, 42, 0), (1, 48, 0)]\n", "A, shift and B"
    mouse.move(10, -3)
    assert reader.stdout.readline() == b"[(2, 0, 10), (2, 1, -3)]\n"
    tablet.move(0.5, 1)
    assert reader.stdout.readline() == b"[(3, 0, 16384), (3, 1, 32767)]\n"
    assert reader.wait(20) == 0
    for name in ("keyboard", "mouse", "tablet"):
        redirecting.devices.detach(name)
    assert not (keyboard.faults or mouse.faults or tablet.faults)


def test_a_device_whose_owner_is_killed_is_pulled_out(redirecting: Machine, wall_home: VmHome) -> None:
    code = (
        "import sys\nfrom trivisor import VMM\nfrom trivisor.vos.devices import Endpoint, Interface, UsbDevice\n"
        "class Thing(UsbDevice):\n    interfaces = (Interface(255, endpoints=(Endpoint(0x81),)),)\n"
        f"VMM({str(wall_home.root)!r}).get({redirecting.id!r}).devices.attach(Thing(), 'theirs')\n"
        "print('attached', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"attached\n"
        node = redirecting.devices.node("theirs")
        owner.send_signal(signal.SIGKILL)
    redirecting.exec(f"n=0; while [ -e {node} ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done; [ ! -e {node} ]", check=True)
    redirecting.devices.detach("theirs")


@pytest.mark.parametrize("bus", ["usb", "nvme"])
def test_a_disk_at_another_bus(full: Machine, tmp_path: Path, bus: str) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"first sector".ljust(512, b"\0"))
    os.truncate(path, 8 << 20)
    for _ in range(2):
        full.devices.attach(Disk(path, bus=bus), "data")  # type: ignore[arg-type]
        node = full.devices.node("data")
        assert node is not None
        assert node.startswith({"usb": "/dev/sd", "nvme": "/dev/nvme"}[bus])
        assert full.exec(f"head -c 12 {node}", check=True).stdout == b"first sector"
        full.devices.detach("data")
        until(lambda node=node: not full.files.exists(node))  # of a USB disk its entry in sysfs goes first


def test_a_kernel_without_usb_says_so(running: Machine, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="no driver for usb") as caught:
        running.devices.attach(Keyboard())
    assert "full" in caught.value.hint
    assert running.devices.list() == []


def test_a_disk_that_loses_a_sector(running: Machine) -> None:
    said = bad_sectors.lose_a_sector(running)
    assert said.startswith("precious\n")
    assert "Input/output error" in said
