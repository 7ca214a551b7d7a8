"""The host's own devices in a running QEMU: handed over as descriptors, so its jail sees no more of the host than before.

USB by usb-host: libusb takes a device's node as a descriptor, named by an fdset. PCI by VFIO: the device's own node and an iommufd, which
QEMU takes since 9.0. The guest's memory is pinned then, all of it, so QEMU is allowed to lock as much.
"""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trivisor.core.devices import PciPassthrough, UsbPassthrough
from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.paths import MachineDir
from trivisor.core.process import start_time
from trivisor.core.units import MIB
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vos.devices.hostpci import check_pci
from trivisor.vos.devices.hostusb import open_usb

_BESIDE = 1024 * MIB
"""What is pinned beside the guest's memory: QEMU's own, and the device's."""


def usb_device(node: str, bus: str, fdset: int) -> dict[str, Any]:
    """Return device_add's arguments for the USB device whose node is in `fdset`."""
    return {"id": node, "bus": bus, "driver": "usb-host", "hostdevice": f"/dev/fdset/{fdset}"}


def pci_device(node: str, port: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return object-add's and device_add's arguments for the PCI device that QEMU has as NODE-device, with the iommufd NODE-iommu."""
    backend = {"qom-type": "iommufd", "id": f"{node}-iommu", "fd": f"{node}-iommu"}
    return backend, {"id": node, "bus": port, "driver": "vfio-pci", "fd": f"{node}-device", "iommufd": f"{node}-iommu"}


def plug_usb(qmp: Qmp, node: str, bus: str, device: UsbPassthrough) -> None:
    """Hand over a USB device. Raises NotFound, InvalidSpec, HostLacks, EngineError."""
    fd = open_usb(device)
    try:
        fdset = int(qmp.ask("add-fd", {}, fd=fd)["fdset-id"])
    finally:
        os.close(fd)
    try:
        qmp.ask("device_add", usb_device(node, bus, fdset))
    except EngineError as error:
        if "valid device model" not in str(error):
            raise
        # Distributions build that part apart, and with a library of its own.
        raise HostLacks("this QEMU has no part for the host's USB", hint="apt-get install qemu-system-common libusb-1.0-0") from error
    finally:
        # What was opened holds a descriptor of its own.
        qmp.ask("remove-fd", {"fdset-id": fdset})


def plug_pci(qmp: Qmp, node: str, port: str, device: PciPassthrough, engine: int | None, memory: int) -> None:
    """Hand over a PCI device; `engine` is QEMU's pid, `memory` bytes are the guest's. Raises NotFound, HostLacks, EngineError."""
    found = check_pci(device)
    assert found.node is not None
    if engine is not None:
        allow_pinning(engine, memory + _BESIDE)
    backend, added = pci_device(node, port)
    with ExitStack() as stack:
        for name, path in ((f"{node}-iommu", Path("/dev/iommu")), (f"{node}-device", found.node)):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            qmp.ask("getfd", {"fdname": name}, fd=fd)
        try:
            qmp.ask("object-add", backend)
        except EngineError as error:
            raise HostLacks("this QEMU takes no PCI device as a descriptor", hint="QEMU 9.0 or later, with iommufd") from error
        qmp.ask("device_add", added)


def engine_pid(place: MachineDir) -> int | None:
    """Return QEMU's pid; None if it has ended."""
    try:
        pid, started = map(int, (place.root / "engine").read_text().split())
    except (OSError, ValueError):
        return None
    return pid if start_time(pid) == started else None


def allow_pinning(pid: int, size: int) -> None:
    """Let a process lock `size` bytes of memory at least. Raises HostLacks if that is not for us to allow."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < size:
        try:
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (size, hard if hard == unlimited else max(hard, size)))
        except (PermissionError, ValueError) as error:  # whichever this Python makes of EPERM
            hint = f"run as root, or allow it: ulimit -l {size // 1024}"
            raise HostLacks("a PCI device pins the machine's memory, more than this user may lock", hint=hint) from error
