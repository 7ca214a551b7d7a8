"""`vm.devices`: disks and other devices that come and go while a machine runs, those made of Python functions among them."""

from __future__ import annotations

from trivisor.core.devices import Disk, NetworkCard, PciPassthrough, Random, SerialSocket, SharedFolder, UsbPassthrough, Watchdog
from trivisor.vos.devices.block import BlockDevice
from trivisor.vos.devices.char import CharDevice
from trivisor.vos.devices.hostpci import HostPci, host_pci
from trivisor.vos.devices.hostusb import HostUsb, host_usb
from trivisor.vos.devices.input import Keyboard, Mouse, Tablet
from trivisor.vos.devices.serial import Serial
from trivisor.vos.devices.service import Attached, Devices
from trivisor.vos.devices.storage import UsbStorage
from trivisor.vos.devices.usb import Endpoint, Interface, Setup, UsbDevice
from trivisor.vos.devices.usbredir import Stall

__all__ = [
    "Attached",
    "BlockDevice",
    "CharDevice",
    "Devices",
    "Disk",
    "Endpoint",
    "HostPci",
    "HostUsb",
    "Interface",
    "Keyboard",
    "Mouse",
    "NetworkCard",
    "PciPassthrough",
    "Random",
    "Serial",
    "SerialSocket",
    "Setup",
    "SharedFolder",
    "Stall",
    "Tablet",
    "UsbDevice",
    "UsbPassthrough",
    "UsbStorage",
    "Watchdog",
    "host_pci",
    "host_usb",
]
