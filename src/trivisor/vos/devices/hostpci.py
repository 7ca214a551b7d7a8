"""PCI devices of the host, and what stands between one and a machine: its IOMMU group, the drivers, the permission.

An IOMMU tells apart only groups of devices, so a machine gets a device when all that is in its group has left its own driver for
vfio-pci; bridges stay. Nothing is bound or unbound here: that takes a device from the host, which its administrator does.
Linux, Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.devices import PciPassthrough
from trivisor.core.errors import HostLacks, NotFound

_DEVICES = "sys/bus/pci/devices"
_VFIO = "vfio-pci"
_BRIDGE = 6
_NO_IOMMU = "enable VT-d or AMD-Vi in the firmware, and start the host with intel_iommu=on or amd_iommu=on"


@dataclass(frozen=True)
class Member:
    """One device of an IOMMU group."""

    address: str
    id: str
    """Vendor and device, such as 10de:1eb8."""
    driver: str
    """"" for none."""
    bridge: bool
    """It belongs to the bus, and needs no driver of its own to be given up."""

    @property
    def free(self) -> bool:
        return self.bridge or self.driver == _VFIO

    def __str__(self) -> str:
        return f"{self.address} ({self.id}, {self.driver or 'no driver'})"


@dataclass(frozen=True)
class HostPci:
    """One PCI device, and whether a machine could have it."""

    address: str
    id: str
    driver: str
    group: int | None
    """Its IOMMU group, None without an IOMMU."""
    members: tuple[Member, ...]
    """All of that group, the device among them."""
    node: Path | None
    """What a machine's engine is handed: /dev/vfio/devices/vfioN. None while vfio-pci does not have it, or without a kernel that can."""
    permitted: bool
    """Whether this process may open the node, and /dev/iommu."""

    @property
    def ready(self) -> bool:
        return self.group is not None and all(member.free for member in self.members) and self.node is not None and self.permitted

    @property
    def todo(self) -> tuple[str, ...]:
        """What must be done, by root, before a machine can have it: commands, or sentences. Empty when it is ready."""
        if self.group is None:
            return (_NO_IOMMU,)
        steps = [step for member in self.members if not member.free for step in _freeing(member)]
        if steps:
            return ("modprobe vfio-pci", *steps)
        if self.node is None:
            return ("start a kernel with VFIO_DEVICE_CDEV and IOMMUFD (Linux 6.6), which give devices as descriptors",)
        return () if self.permitted else (f"let this user read and write {self.node} and /dev/iommu, with a udev rule or chown",)

    def __str__(self) -> str:
        """The whole report, in lines."""
        lines = [f"{self.address} ({self.id}), driver: {self.driver or 'none'}"]
        if self.group is None:
            lines.append("no IOMMU group: the host has no IOMMU, or does not use it")
        else:
            lines.append(f"IOMMU group {self.group}, of {', '.join(map(str, self.members))}")
            if self.node is not None:
                lines.append(f"{self.node}: {'may' if self.permitted else 'may not'} be opened")
        return "\n".join([*lines, *(f"to do: {step}" for step in self.todo)] if self.todo else [*lines, "ready"])


def host_pci(root: Path = Path("/")) -> list[HostPci]:
    """Return the host's PCI devices by address; `root` is where its /sys and /dev are. Raises HostLacks if it has no PCI."""
    try:
        addresses = _names(root / _DEVICES)
    except OSError as error:
        raise HostLacks("this host has no PCI", hint="its kernel shows none in /sys/bus/pci") from error
    return [_read(address, root) for address in addresses]


def find_pci(wanted: PciPassthrough, root: Path = Path("/")) -> HostPci:
    """Return the device that is meant. Raises NotFound, HostLacks."""
    there = host_pci(root)
    found = next((device for device in there if device.address == wanted.address), None)
    if found is None:
        known = ", ".join(f"{device.address} ({device.id})" for device in there)
        raise NotFound(f"there is no PCI device {wanted.address}", hint=f"there are: {known}" if there else "the host shows none")
    return found


def check_pci(wanted: PciPassthrough, root: Path = Path("/")) -> HostPci:
    """Return the device that is meant if a machine can have it. Raises NotFound; HostLacks with what is to be done."""
    found = find_pci(wanted, root)
    if found.ready:
        return found
    busy = [member for member in found.members if not member.free]
    if found.group is None:
        why = "the host has no IOMMU in use, which would keep it to the machine's memory"
    elif busy:
        why = f"of its IOMMU group {found.group} not all are free: {', '.join(map(str, busy))}"
    elif found.node is None:
        why = "the host's kernel gives no descriptor of it"
    else:
        why = f"{found.node} or /dev/iommu may not be opened"
    raise HostLacks(f"the PCI device {found.address} cannot be handed on: {why}", hint="; ".join(found.todo))


def _freeing(member: Member) -> list[str]:
    place = f"/sys/bus/pci/devices/{member.address}"
    unbind = [f"echo {member.address} >{place}/driver/unbind"] if member.driver else []
    return [f"echo {_VFIO} >{place}/driver_override", *unbind, f"echo {member.address} >/sys/bus/pci/drivers_probe"]


def _read(address: str, root: Path) -> HostPci:
    folder = root / _DEVICES / address
    group: int | None = None
    members = [_member(address, root)]
    with suppress(OSError, ValueError):
        group = int((folder / "iommu_group").readlink().name)
        members = [_member(name, root) for name in _names(folder / "iommu_group/devices")]
    node = None
    with suppress(OSError, IndexError):
        node = root / "dev/vfio/devices" / _names(folder / "vfio-dev")[0]
    permitted = node is not None and all(os.access(path, os.R_OK | os.W_OK) for path in (node, root / "dev/iommu"))
    return HostPci(address, _id(folder), _driver(folder), group, tuple(members) if group is not None else (), node, permitted)


def _member(address: str, root: Path) -> Member:
    folder = root / _DEVICES / address
    kind = _text(folder / "class")
    return Member(address, _id(folder), _driver(folder), kind.startswith(f"0x{_BRIDGE:02x}"))


def _driver(folder: Path) -> str:
    with suppress(OSError):
        return (folder / "driver").readlink().name
    return ""


def _id(folder: Path) -> str:
    return f"{_text(folder / 'vendor').removeprefix('0x')}:{_text(folder / 'device').removeprefix('0x')}"


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace").strip()[:64]
    return ""


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())
