"""How quickly does a device come and go, and what does a disk made of Python cost?

The peer of a disk made of Python is a raw file, read in the same machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench import plugging
from bench.common import Row, Series, main, row
from trivisor import VMM, Machine
from trivisor.core.units import MIB
from trivisor.vos.devices import BlockDevice, Disk, UsbStorage

IMAGE = "debian"
SIZE = 64 * MIB
NOTES = """
A device is attached when the guest has found it and a program in it can open it. Reads are of 64 MiB in pieces of 1 MiB, past the guest's
cache, by `dd`; its start is in both. Under TCG the guest's own work is most of either. A stick is at USB, in a machine with the full
kernel: its bound is that of 2 MB/s.
"""


class Memory(BlockDevice):
    """A disk in this process's memory."""

    def __init__(self) -> None:
        super().__init__(SIZE, readonly=True)
        self.data = bytes(SIZE)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def _plug(vm: Machine, device: Disk | BlockDevice | UsbStorage, rounds: int) -> tuple[Series, Series]:
    came, went = Series(), Series()
    for _ in range(rounds):
        with came.timed():
            vm.devices.attach(device, "disk")
        with went.timed():
            vm.devices.detach("disk")
    return came, went


def _read(vm: Machine, device: Disk | BlockDevice | UsbStorage, rounds: int) -> Series:
    series = Series()
    vm.devices.attach(device, "disk")
    node = vm.devices.node("disk")
    for _ in range(rounds):
        with series.timed():
            vm.exec(f"dd if={node} of=/dev/null bs=1M iflag=direct 2>/dev/null", check=True)
    vm.devices.detach("disk")
    return series


def rows(quick: bool) -> list[Row]:
    """Time disks that come and go, and reading from them."""
    rounds = 5 if quick else 20
    with VMM() as vmm, vmm.run(IMAGE, wall="vm") as vm, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.raw"
        path.write_bytes(bytes(SIZE))
        raw, python = Disk(path, readonly=True), Memory()
        came, went = _plug(vm, raw, rounds)
        made, _ = _plug(vm, python, rounds)
        file, ours = _read(vm, raw, rounds), _read(vm, python, rounds)
        with vmm.run(IMAGE, wall="vm", kernel="full") as full:
            plugged, _ = _plug(full, UsbStorage(python), rounds)
            slow, stick = _read(full, Disk(path, readonly=True, bus="usb"), rounds), _read(full, UsbStorage(python), rounds)
        kinds = plugging.rows(vmm, IMAGE, rounds)
    return [
        row("disk attached to a running VM, until it can be used", came, "ms", bound=1000),
        row("disk made of Python attached, until it can be used", made, "ms", bound=1000),
        row("disk detached", went, "ms"),
        row("64 MiB read from a disk made of Python", ours, "ms", bound=2 * file.median, peer="a raw file", against=file),
        row("USB stick made of Python attached, until it can be used", plugged, "ms", bound=1000),
        row("64 MiB read from a USB stick made of Python", stick, "ms", bound=SIZE / 2000, peer="a raw file as a USB stick", against=slow),
        *kinds,
    ]


if __name__ == "__main__":
    main(rows, NOTES)
