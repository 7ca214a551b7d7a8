"""A button made of Python, at a guest's USB: a program in it waits until Python presses it. `usb_button.py`."""

from __future__ import annotations

import struct

from trivisor import VMM, Machine
from trivisor.vos.devices import Endpoint, Interface, Setup, Stall, UsbDevice

# A game pad with one button: a bit, and seven that say nothing (HID 1.11, 6.2.2).
REPORT = bytes.fromhex("05010905a101 05090901 15002501 75019501 8102 75079501 8103 c0")
PRESSED, RELEASED = b"\1", b"\0"
TO_GUEST = 0x81
GET_DESCRIPTOR, SET_IDLE = 6, 10


class Button(UsbDevice):
    """A button of the HID class, for which Linux has a driver."""

    product = 0x0030
    names = ("Trivisor", "Red button")
    interfaces = (
        Interface(3, 0, 0, (Endpoint(TO_GUEST, "interrupt", 8, 4),), struct.pack("<BBHBBBH", 9, 0x21, 0x0111, 0, 1, 0x22, len(REPORT))),
    )

    def control(self, setup: Setup, data: bytes) -> bytes:
        if setup.request == GET_DESCRIPTOR and setup.value >> 8 == 0x22:
            return REPORT
        if setup.request == SET_IDLE:
            return b""
        raise Stall

    def press(self) -> None:
        self.send(TO_GUEST, PRESSED)
        self.send(TO_GUEST, RELEASED)


WAIT = """
import glob, struct, time
while not (found := [p for p in glob.glob('/sys/class/input/event*') if 'Red button' in open(p + '/device/name').read()]):
    time.sleep(0.01)
with open('/dev/input/' + found[0].split('/')[-1], 'rb') as events:
    print('ready')
    while True:
        kind, code, value = struct.unpack('16xHHi', events.read(24))  # input_event, linux/input.h
        if kind == 1:
            print(f'button {code:#x} is', 'down' if value else 'up')
            if not value:
                break
"""


def press(vm: Machine) -> str:
    """Return what a program in the guest says that waits for the button."""
    button = Button()
    name = vm.devices.attach(button).name
    waiting = vm.spawn(["python3", "-uc", WAIT])
    assert waiting.stdout.readline() == b"ready\n"
    button.press()
    said = waiting.stdout.read().decode()
    waiting.wait(30)
    vm.devices.detach(name)
    return said


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall="vm", kernel="full") as machine:
        print(press(machine), end="")
