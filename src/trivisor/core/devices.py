"""Devices that a machine may be given, as values: checked once when they are made, kept with the machine, read by engines.

A file that a guest writes to can be made to look like anything, so a disk's format is never guessed from its content: it is said,
or follows from the file's name, and is kept.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import parse_size

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")
"""A device's: as long as a disk's serial number may be, by which it is found in the guest."""
STORED = "disk:"
"""Begins what a disk of the home is called where a path could be."""
SECTOR = 512
Format = Literal["raw", "qcow2"]
Bus = Literal["virtio", "nvme", "usb"]
Action = Literal["reset", "poweroff", "pause", "none"]
_DISK = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
_NETWORK = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USB_ID = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")
_USB_PORT = re.compile(r"[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}")
_PCI = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


@dataclass(frozen=True)
class Disk:
    """A disk in a file of the host's, or a block device. Raises InvalidSpec.

    `path` may be "disk:NAME", a disk of the home (vmm/disks.py): the machine then has its own part over it, or with `readonly` the disk
    itself. `format` is by default qcow2 for a name that ends so, else raw. `iops` (a second) and `bandwidth` (bytes a second, or text
    such as "10M") bound reading and writing together. `bus` is what the guest finds it at: a virtio disk, an NVMe drive or a USB stick.
    """

    path: str | os.PathLike[str]
    format: Format | None = None
    readonly: bool = False
    iops: int | None = None
    bandwidth: int | str | None = None
    bus: Bus = "virtio"
    below: str = ""
    """Of a machine's own part of a disk of the home: that disk. Set when it is attached."""

    def __post_init__(self) -> None:
        stored = str(self.path).startswith(STORED)
        path = str(self.path) if stored else str(Path(self.path).absolute())
        object.__setattr__(self, "path", path)
        if stored and disk_name(path.removeprefix(STORED)) and self.format not in (None, "qcow2"):
            raise InvalidSpec("a disk of the home is a qcow2", hint="leave out the format")
        if "\0" in path:
            raise InvalidSpec("a disk's path holds a NUL")
        kind = self.format or ("qcow2" if stored or path.endswith(".qcow2") else "raw")
        if kind not in ("raw", "qcow2"):
            raise InvalidSpec(f"a disk's format is raw or qcow2, not {kind!r}")
        object.__setattr__(self, "format", kind)
        if self.bus not in ("virtio", "nvme", "usb"):
            raise InvalidSpec(f"a disk is at virtio, nvme or usb, not {self.bus!r}")
        if self.iops is not None and (isinstance(self.iops, bool) or not isinstance(self.iops, int) or not 1 <= self.iops <= 10**9):
            raise InvalidSpec(f"iops must be 1 to a thousand million a second, not {self.iops!r}")
        if self.bandwidth is not None:
            object.__setattr__(self, "bandwidth", parse_size(self.bandwidth, "bandwidth"))

    @property
    def file(self) -> Path:
        return Path(self.path)

    @property
    def stored(self) -> str:
        """The name of a disk of the home that is still to be opened, or ""."""
        path = str(self.path)
        return path.removeprefix(STORED) if path.startswith(STORED) else ""

    @property
    def bytes_a_second(self) -> int | None:
        """`bandwidth` in numbers."""
        return None if self.bandwidth is None else int(self.bandwidth)


@dataclass(frozen=True)
class Served:
    """A device that a process of the host answers for, over a connected socket, while it lives."""

    kind: Literal["block", "char", "usb", "serial"]
    """block: an NBD server's other end. char, serial: a stream of bytes. usb: the host's side of a redirected USB device."""
    readonly: bool = False
    disk: bool = False
    """Of usb: the guest finds a disk in it."""


@dataclass(frozen=True)
class Random:
    """A source of random numbers (virtio-rng), as QEMU's own generator gives them."""


@dataclass(frozen=True)
class SerialSocket:
    """A serial port whose other end is a unix socket of the host's, at `path`: who connects there talks to it, one after the other.

    It may be connected to before the guest uses it; what is said while nobody is connected is lost. Raises InvalidSpec.
    """

    path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _absolute(self.path, "socket's"))


@dataclass(frozen=True)
class NetworkCard:
    """A further network card, on `network`: "nat", or the name of a network. `mac` is its own unless given. Raises InvalidSpec."""

    network: str = "nat"
    mac: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.network, str) or self.network in ("none", "host") or not _NETWORK.fullmatch(self.network):
            raise InvalidSpec(f"a network card is on nat or a named network, not {self.network!r}")
        if self.mac is not None:
            mac = str(self.mac).lower().replace("-", ":")
            if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
                raise InvalidSpec(f"{self.mac!r} is no address of a network card", hint="for example 52:54:00:12:34:56")
            object.__setattr__(self, "mac", mac)


@dataclass(frozen=True)
class SharedFolder:
    """The host's folder `path`, at `target` in the guest. Raises InvalidSpec."""

    path: str | os.PathLike[str]
    target: str
    readonly: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _absolute(self.path, "folder's"))
        target = self.target
        if not isinstance(target, str) or not target.startswith("/") or "\0" in target or len(target.encode()) > 1024:
            raise InvalidSpec(f"{target!r} is no place for a folder", hint="an absolute path in the guest")
        if not set(target.split("/")) - {""} or {".", ".."} & set(target.split("/")):
            raise InvalidSpec(f"{target!r} is no place for a folder", hint="below /, without . and ..")
        object.__setattr__(self, "target", "/" + "/".join(part for part in target.split("/") if part))


@dataclass(frozen=True)
class Watchdog:
    """A watchdog card (i6300ESB, /dev/watchdog0): when the guest has opened it and does not write to it in time, it fires.

    `action`: reset and poweroff end the machine, pause pauses it, none does nothing; an event of kind "watchdog" comes of each.
    Raises InvalidSpec.
    """

    action: Action = "reset"

    def __post_init__(self) -> None:
        if self.action not in ("reset", "poweroff", "pause", "none"):
            raise InvalidSpec(f"a watchdog's action is reset, poweroff, pause or none, not {self.action!r}")


@dataclass(frozen=True)
class UsbPassthrough:
    """A USB device of the host's: by vendor and product ("046d:c52b"), or by the port that it is plugged into ("1-2.4").

    The host's own drivers lose it until it is detached. Raises InvalidSpec.
    """

    device: str

    def __post_init__(self) -> None:
        device = self.device.lower() if isinstance(self.device, str) else ""
        if not _USB_ID.fullmatch(device) and not _USB_PORT.fullmatch(device):
            raise InvalidSpec(
                f"{self.device!r} is no USB device", hint='for example UsbPassthrough("046d:c52b") or UsbPassthrough("1-2.4")'
            )
        object.__setattr__(self, "device", device)


@dataclass(frozen=True)
class PciPassthrough:
    """A PCI device of the host's, by its address ("0000:01:00.0", or without the domain), through VFIO. Raises InvalidSpec."""

    address: str

    def __post_init__(self) -> None:
        address = self.address.lower() if isinstance(self.address, str) else ""
        address = address if address.count(":") == 2 else f"0000:{address}"
        if not _PCI.fullmatch(address):
            raise InvalidSpec(f"{self.address!r} is no address of a PCI device", hint='for example PciPassthrough("0000:01:00.0")')
        object.__setattr__(self, "address", address)


Value = Disk | Random | SerialSocket | NetworkCard | SharedFolder | Watchdog | UsbPassthrough | PciPassthrough
"""Devices that need no process to answer for them: they are the machine's until they are detached."""
Device = Value | Served
KINDS: dict[str, type[Value]] = {
    "disk": Disk,
    "random": Random,
    "serial": SerialSocket,
    "network": NetworkCard,
    "folder": SharedFolder,
    "watchdog": Watchdog,
    "hostusb": UsbPassthrough,
    "hostpci": PciPassthrough,
}


def check_name(name: str) -> str:
    """Return `name` if a device may have it. Raises InvalidSpec."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} is no name for a device", hint="a-z, 0-9 and -, at most 20, starting and ending with a letter or digit"
        )
    return name


def disk_name(name: str) -> str:
    """Return `name` if a disk of the home may have it. Raises InvalidSpec."""
    if not isinstance(name, str) or not _DISK.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} is no name for a disk", hint="a-z, 0-9, - and _, at most 63, starting and ending with a letter or digit"
        )
    return name


def kind_of(device: Device) -> str:
    """Return what a device is, in a word: that of a Served, or of KINDS."""
    return device.kind if isinstance(device, Served) else next(kind for kind, known in KINDS.items() if isinstance(device, known))


def path_of(device: Device) -> str:
    """Return which file of the host's it is made of, or ""."""
    return str(device.path) if isinstance(device, Disk | SerialSocket | SharedFolder) else ""


def _absolute(path: str | os.PathLike[str], whose: str) -> str:
    found = str(Path(path).absolute())
    if "\0" in found:
        raise InvalidSpec(f"a {whose} path holds a NUL")
    return found
