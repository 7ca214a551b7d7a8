"""How quickly each kind of device comes and goes: a part of bench/devices.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.common import Row, Series, row
from trivisor import VMM, Machine
from trivisor.core.devices import Value
from trivisor.core.errors import HostLacks
from trivisor.vos.devices import CharDevice, Disk, Keyboard, NetworkCard, Random, Serial, SerialSocket, SharedFolder, UsbDevice, Watchdog

SIZE = 1 << 20
Made = Callable[[Path], Value | CharDevice | UsbDevice]
KINDS: Mapping[str, Made] = {
    "virtio disk": lambda folder: Disk(folder / "disk.raw"),
    "NVMe drive": lambda folder: Disk(folder / "disk.raw", bus="nvme"),
    "USB stick": lambda folder: Disk(folder / "disk.raw", bus="usb"),
    "random source": lambda _: Random(),
    "serial port at a socket": lambda folder: SerialSocket(folder / "port"),
    "serial port at a terminal": lambda _: Serial(),
    "network card": lambda _: NetworkCard("bench"),
    "shared folder": lambda folder: SharedFolder(folder, "/mnt/bench"),
    "watchdog": lambda _: Watchdog("none"),
    "line made of Python": lambda _: CharDevice(),
    "keyboard made of Python": lambda _: Keyboard(),
}


def rows(vmm: VMM, image: str, rounds: int) -> list[Row]:
    """Time each kind in one machine. The first of a kind loads its driver, and is among the rounds."""
    made = []
    with vmm.run(image, wall="vm", kernel="full", ram="shared") as vm, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "disk.raw").write_bytes(bytes(SIZE))
        for kind, device in KINDS.items():
            try:
                came, went = _rounds(vm, lambda make=device: make(Path(folder)), rounds)  # type: ignore[misc]
            except HostLacks:  # of this kind nothing, here
                continue
            made.append(row(f"{kind} attached, until it can be used", came, "ms", bound=1000))
            made.append(row(f"{kind} detached", went, "ms"))
    return made


def _rounds(vm: Machine, make: Callable[[], Value | CharDevice | UsbDevice], rounds: int) -> tuple[Series, Series]:
    came, went = Series(), Series()
    for _ in range(rounds):
        device = make()
        with came.timed():
            vm.devices.attach(device, "bench")
        with went.timed():
            vm.devices.detach("bench")
    return came, went
