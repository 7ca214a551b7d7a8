"""A USB serial adapter (CDC ACM) made of Python: what the guest writes to /dev/ttyACM0 comes back in capitals. `usb_serial.py`."""

from __future__ import annotations

from trivisor import VMM, Machine
from trivisor.vos.devices import Endpoint, Interface, Setup, Stall, UsbDevice

# Functional descriptors of the class (CDC 1.2, PSTN 1.2): header, abstract control, union of interfaces 0 and 1, call management.
CLASS = bytes.fromhex("0524001001 04240202 0524060001 0524010001")
SET_LINE_CODING, GET_LINE_CODING, SET_CONTROL_LINE_STATE = 0x20, 0x21, 0x22
NOTICES, TO_GUEST, FROM_GUEST = 0x83, 0x81, 0x02


class SerialAdapter(UsbDevice):
    """Answers each line in capitals."""

    product = 0x0010
    cls = 2
    names = ("Trivisor", "Shouting serial adapter")
    interfaces = (
        Interface(2, 2, 1, (Endpoint(NOTICES, "interrupt", 16, 8),), CLASS),
        Interface(10, 0, 0, (Endpoint(TO_GUEST), Endpoint(FROM_GUEST))),
    )

    def __init__(self) -> None:
        super().__init__()
        self.coding = bytes(7)
        self.line = b""

    def control(self, setup: Setup, data: bytes) -> bytes:
        if setup.request == SET_LINE_CODING:
            self.coding = data
        elif setup.request == GET_LINE_CODING:
            return self.coding
        elif setup.request != SET_CONTROL_LINE_STATE:
            raise Stall
        return b""

    def received(self, endpoint: int, data: bytes) -> None:
        *lines, self.line = (self.line + data).split(b"\n")
        for line in lines:
            self.send(TO_GUEST, line.upper() + b"\n")


def talk(vm: Machine) -> str:
    """Return what the guest's kernel says of the adapter, and what a program in it hears from it."""
    name = vm.devices.attach(SerialAdapter(), "shout").name
    place = vm.devices.node(name)
    script = f"cat {place}/product; stty -F /dev/ttyACM0 raw -echo; exec 3<>/dev/ttyACM0; echo hello >&3; head -n 1 <&3"
    try:
        return vm.exec(script, timeout=30, check=True).text
    finally:
        vm.devices.detach(name)


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall="vm", kernel="full") as machine:
        print(talk(machine), end="")
