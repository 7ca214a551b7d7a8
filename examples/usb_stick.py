"""A USB stick made of Python: a guest puts a file on it, it is pulled out, looked into, written to, and plugged again. `usb_stick.py`."""

from __future__ import annotations

from trivisor import VMM, Machine
from trivisor.vos.devices import BlockDevice, UsbStorage


class Memory(BlockDevice):
    """A disk in this process's memory, which counts what is asked of it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.data = bytearray(size)
        self.reads = self.writes = 0

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.writes += 1
        self.data[offset : offset + len(data)] = data


class RedStick(UsbStorage):
    """What the guest's kernel sees when it is plugged."""

    product = 0x0021
    names = ("Trivisor", "Red stick")


def carry(vm: Machine) -> str:
    """Return what the guest says of the stick, and of a file on it that was changed on its way."""
    memory = Memory(16 << 20)
    stick = RedStick(memory)
    vm.devices.attach(stick, "red")
    node = vm.devices.node("red")
    said = vm.exec(f"cat /sys/block/{str(node)[5:]}/device/model", check=True).text
    vm.exec(f"mkfs.ext4 -q {node} && mkdir -p /mnt/stick && mount {node} /mnt/stick", check=True)
    vm.exec("echo made in a machine >/mnt/stick/note; umount /mnt/stick", check=True)
    vm.devices.detach("red")

    at = memory.data.find(b"made in a machine")
    memory.data[at : at + 4] = b"seen"
    vm.devices.attach(stick, "red")
    said += vm.exec(f"mount {vm.devices.node('red')} /mnt/stick && cat /mnt/stick/note; umount /mnt/stick", check=True).text
    vm.devices.detach("red")
    return said + f"{memory.reads > 0 and memory.writes > 0}\n"


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall="vm", kernel="full") as machine:
        print(carry(machine), end="")
