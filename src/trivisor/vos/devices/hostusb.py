"""USB devices of the host, as its sysfs shows them: which there are, which one is meant, and whether this process may open it.

Hubs are left out: they cannot be handed on. Texts come from the devices, so they are cut and stripped of what is no text.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.devices import UsbPassthrough
from trivisor.core.errors import HostLacks, InvalidSpec, NotFound

_DEVICES = "sys/bus/usb/devices"
_HUB = 9
_TEXT = 126


@dataclass(frozen=True)
class HostUsb:
    """One device at the host's USB."""

    id: str
    """Vendor and product, such as 046d:c52b."""
    port: str
    """Where it is plugged: the bus, and the port of each hub, such as 1-2.4."""
    maker: str
    product: str
    serial: str
    drivers: tuple[str, ...]
    """The host's drivers that have it now; they lose it when a machine gets it."""
    node: Path
    permitted: bool
    """Whether this process may open it."""

    def __str__(self) -> str:
        name = " ".join(part for part in (self.maker, self.product) if part) or "a device without a name"
        used = f", used by {', '.join(self.drivers)}" if self.drivers else ""
        return f"{self.id} at {self.port}: {name}{used}{'' if self.permitted else ', which may not be opened'}"


def host_usb(root: Path = Path("/")) -> list[HostUsb]:
    """Return the host's USB devices by port; `root` is where its /sys and /dev are. Raises HostLacks if the host has no USB."""
    try:
        folders = sorted((root / _DEVICES).iterdir())
    except OSError as error:
        raise HostLacks("this host has no USB", hint="its kernel shows none in /sys/bus/usb; is this a virtual machine?") from error
    return [found for folder in folders if ":" not in folder.name and (found := _read(folder, root)) is not None]


def find_usb(wanted: UsbPassthrough, root: Path = Path("/")) -> HostUsb:
    """Return the device that is meant. Raises NotFound, InvalidSpec for an id that several have, HostLacks."""
    there = host_usb(root)
    found = [device for device in there if wanted.device in (device.id, device.port)]
    if not found:
        known = "; ".join(map(str, there)) or "none"
        raise NotFound(f"there is no USB device {wanted.device}", hint=f"there are: {known}" if there else "none is plugged")
    if len(found) > 1:
        raise InvalidSpec(
            f"{len(found)} USB devices are {wanted.device}: at {', '.join(device.port for device in found)}",
            hint=f'say which by its port, for example UsbPassthrough("{found[0].port}")',
        )
    return found[0]


def open_usb(wanted: UsbPassthrough, root: Path = Path("/")) -> int:
    """Return a descriptor of the device that is meant, the caller's to close. Raises as `find_usb` does."""
    found = find_usb(wanted, root)
    try:
        return os.open(found.node, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        vendor, product = found.id.split(":")
        rule = f'SUBSYSTEM=="usb", ATTR{{idVendor}}=="{vendor}", ATTR{{idProduct}}=="{product}", MODE="0660", GROUP="plugdev"'
        hints = {
            PermissionError: f"run as root, or give it to a group of yours with a udev rule: {rule}",
            FileNotFoundError: "/dev/bus/usb is not here: in a container it must be handed in",
        }
        hint = hints.get(type(error), "was it pulled out?")
        raise HostLacks(f"the USB device {found.id} at {found.port} cannot be opened: {error.strerror}", hint=hint) from error


def _read(folder: Path, root: Path) -> HostUsb | None:
    """Return what a folder tells of a device, None for a hub, and for one that goes just now."""
    vendor, product = _text(folder / "idVendor"), _text(folder / "idProduct")
    bus, number = _text(folder / "busnum"), _text(folder / "devnum")
    if not (vendor and product and bus.isdecimal() and number.isdecimal()) or _text(folder / "bDeviceClass") == f"{_HUB:02x}":
        return None
    node = root / "dev/bus/usb" / f"{int(bus):03d}" / f"{int(number):03d}"
    drivers = {link.resolve().name for link in folder.parent.glob(f"{folder.name}:*/driver")}
    maker, name, serial = (_text(folder / what) for what in ("manufacturer", "product", "serial"))
    permitted = os.access(node, os.R_OK | os.W_OK)
    return HostUsb(f"{vendor}:{product}", folder.name, maker, name, serial, tuple(sorted(drivers)), node, permitted)


def _text(path: Path) -> str:
    with suppress(OSError):
        text = path.read_bytes()[:_TEXT].decode("utf-8", "replace").strip()
        return "".join(letter for letter in text if letter.isprintable())
    return ""
