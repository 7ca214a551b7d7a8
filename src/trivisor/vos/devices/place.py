"""Where the guest's kernel shows a device: by the name that it bears, or by the port that it is plugged into."""

from __future__ import annotations

from trivisor.core.devices import Device, Disk, Served, SharedFolder, Watchdog, kind_of
from trivisor.core.errors import FileError
from trivisor.vos.files import Files

USB = "/sys/bus/usb/devices"
_PCI = "/sys/bus/pci/devices"
_NAMED = {
    "virtio": ("/sys/block", "vd", "serial"),
    "block": ("/sys/block", "vd", "serial"),
    "nvme": ("/sys/block", "nvme", "device/serial"),
    "usb-storage": ("/sys/block", "sd", "device/../../../../serial"),
    "char": ("/sys/class/virtio-ports", "vport", "name"),
    "usb": (USB, "", "serial"),
}
"""Folder, how its name begins there, and the file that holds the name that it was given."""
_PORTED = {"serial": ("tty", "/dev/"), "network": ("net", "/sys/class/net/")}
"""The folder of such things below a device, and where they are for programs."""


def by_port(device: Device) -> bool:
    """Whether it is found by its port: it can bear no name."""
    return kind_of(device) in _PORTED


def has_port(device: Device) -> bool:
    """Whether the engine is to be asked where it is: lines are at a port in a container only."""
    return by_port(device) or where(device) == "char"


def find(files: Files, name: str, device: Device, port: str = "") -> str | None:
    """Return a device's path in the guest, None while it has none. `port`: the PCI address that it is plugged in below, or its node."""
    if port.startswith("/dev/"):
        return port if files.exists(port) else None
    if isinstance(device, SharedFolder):
        return device.target
    if by_port(device):
        return _ported(files, *_PORTED[kind_of(device)], port) if port else None
    if isinstance(device, Watchdog):  # there is one, and its driver names no port
        return _named(files, "/sys/class/watchdog", "watchdog", "identity", "i6300ESB timer")
    if kind_of(device) == "char" and files.exists(f"/dev/{name}"):  # in a container it is there by its name
        return f"/dev/{name}"
    known = _NAMED.get(where(device))
    return _named(files, *known, name) if known else None


def bound(files: Files, port: str) -> str | None:
    """Return the virtio device that is plugged in below a port, once its driver has it."""
    for function in _list(files, f"{_PCI}/{port}"):
        if function.startswith("0000:"):
            for entry in _list(files, f"{_PCI}/{port}/{function}"):
                path = f"{_PCI}/{port}/{function}/{entry}"
                if entry.startswith("virtio") and files.exists(f"{path}/driver"):
                    return path
    return None


def where(device: Device) -> str:
    """Return the row of the table above that is a device's."""
    if isinstance(device, Disk):
        return "usb-storage" if device.bus == "usb" else device.bus
    if isinstance(device, Served) and device.disk:
        return "usb-storage"
    return kind_of(device)


def seen(device: Device) -> bool:
    """Whether there is anything to be found of it."""
    return by_port(device) or isinstance(device, SharedFolder | Watchdog) or where(device) in _NAMED


def _named(files: Files, folder: str, prefix: str, attribute: str, name: str) -> str | None:
    for found in _list(files, folder):
        if found.startswith(prefix) and ":" not in found and _read(files, f"{folder}/{found}/{attribute}") == name.encode():
            path = f"{folder}/{found}" if folder == USB else f"/dev/{found}"
            # An NVMe drive has two names, of which one has no node.
            if files.exists(path):
                return path
    return None


def _ported(files: Files, kind: str, prefix: str, port: str) -> str | None:
    for function in _list(files, f"{_PCI}/{port}"):
        if not function.startswith("0000:"):
            continue
        below = f"{_PCI}/{port}/{function}"
        # A virtio device is one more level down.
        for folder in (below, *(f"{below}/{entry}" for entry in _list(files, below) if entry.startswith("virtio"))):
            for found in _list(files, f"{folder}/{kind}"):
                if files.exists(f"{prefix}{found}"):
                    return f"{prefix}{found}"
    return None


def _list(files: Files, folder: str) -> list[str]:
    """It may be on its way in or out, and its driver may not have been there before."""
    try:
        return [entry.name for entry in files.list(folder)]
    except FileError:
        return []


def _read(files: Files, path: str) -> bytes | None:
    try:
        return files.read(path, max_size=128).strip()
    except FileError:
        return None
