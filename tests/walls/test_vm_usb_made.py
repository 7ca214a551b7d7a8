"""USB devices made of Python, in a virtual machine with the full kernel: a stick that behaves, one that does not, and a button."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, Machine
from trivisor.core.errors import EngineError, HostLacks, NotFound
from trivisor.core.spec import Wall
from trivisor.vmm import means
from trivisor.vmm.engines.vm import passthrough
from trivisor.vos.devices import BlockDevice, PciPassthrough, UsbPassthrough, UsbStorage

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import usb_button
import usb_stick

pytestmark = [pytest.mark.slow, pytest.mark.walls("vm")]
SIZE = 4 << 20


@pytest.fixture(scope="module")
def redirecting(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    """One running machine with the full kernel, where QEMU can redirect USB."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, kernel="full")
        try:
            machine.start()
            machine.devices.attach(usb_button.Button(), "probe")
        except HostLacks as error:
            machine.delete(force=True)
            pytest.skip(f"needs the full kernel and a QEMU with USB redirection: {error}")
        machine.devices.detach("probe")
        yield machine
        machine.delete(force=True)


def test_a_stick_of_sixty_lines(redirecting: Machine) -> None:
    assert len(Path(str(usb_stick.__file__)).read_text().splitlines()) <= 66
    assert usb_stick.carry(redirecting) == "Red stick       \nseen in a machine\nTrue\n"


def test_a_button_of_seventy_lines(redirecting: Machine) -> None:
    assert len(Path(str(usb_button.__file__)).read_text().splitlines()) <= 75
    assert usb_button.press(redirecting) == "button 0x130 is down\nbutton 0x130 is up\n"


class Moody(BlockDevice):
    """Sectors of zeros past which, from 1 MiB, reads fail as `mood` says."""

    mood = ""

    def __init__(self) -> None:
        super().__init__(SIZE, timeout=0.5)
        self.hold = threading.Event()

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > 1 << 20:
            if self.mood == "raises":
                raise OSError(errno.EIO, "a bad sector")
            if self.mood == "hangs":
                self.hold.wait(20)
            if self.mood == "garbage":
                return b"less"
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")


def test_a_stick_that_fails(redirecting: Machine) -> None:
    """The program gets an error within seconds (Linux says ENODATA of a bad medium), and the stick still answers."""
    disk = Moody()
    redirecting.devices.attach(UsbStorage(disk), "moody")
    node = redirecting.devices.node("moody")
    script = f"dd if={node} of=/dev/null bs=64k count=1 skip=$1 iflag=direct 2>&1 | grep -c 'error reading'"
    for mood in ("raises", "hangs", "garbage"):
        disk.mood = mood
        assert redirecting.exec(["sh", "-c", script, "sh", "20"], timeout=30).text == "1\n", mood
        assert redirecting.exec(["sh", "-c", script, "sh", "2"], timeout=30).text == "0\n", mood
    disk.hold.set()
    assert "No space left" in redirecting.exec(f"dd if=/dev/zero of={node} bs=4k count=1 oflag=direct", timeout=30).stderr.decode()
    redirecting.devices.detach("moody")
    assert {type(fault) for fault in disk.faults} == {OSError, TimeoutError, ValueError}


def test_a_stick_that_is_pulled_out_while_it_is_read(redirecting: Machine) -> None:
    disk = Moody()
    redirecting.devices.attach(UsbStorage(disk), "gone")
    node = redirecting.devices.node("gone")
    reader = redirecting.spawn(f"echo go; while dd if={node} of=/dev/null bs=64k count=8 iflag=direct 2>/dev/null; do :; done; echo ended")
    assert reader.stdout.readline() == b"go\n"
    redirecting.devices.detach("gone")
    assert reader.stdout.readline() == b"ended\n"
    assert reader.wait(20) == 0
    assert redirecting.exec("echo alive", check=True).text == "alive\n"


def test_devices_of_the_host_that_are_not_there(redirecting: Machine) -> None:
    for device in (UsbPassthrough("dead:beef"), PciPassthrough("0000:ff:1f.7")):
        with pytest.raises((NotFound, HostLacks)) as caught:
            redirecting.devices.attach(device)
        assert caught.value.hint
    assert redirecting.devices.list() == []


def test_qemu_opens_what_it_is_handed(redirecting: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its jail libusb begins, and asks the node that it is given what it is: as far as a host without such a device can go."""
    monkeypatch.setattr(means, "find_usb", lambda device: None)
    monkeypatch.setattr(passthrough, "open_usb", lambda device: os.open("/dev/null", os.O_RDWR))
    with pytest.raises(EngineError, match="failed to open host usb device /dev/fdset/"):
        redirecting.devices.attach(UsbPassthrough("046d:c52b"))
    assert redirecting.devices.list() == []
    assert redirecting.exec("echo alive", check=True).text == "alive\n"
