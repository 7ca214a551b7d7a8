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
SECTOR = 512
Format = Literal["raw", "qcow2"]
Bus = Literal["virtio", "nvme", "usb"]


@dataclass(frozen=True)
class Disk:
    """A disk in a file of the host's, or a block device. Raises InvalidSpec.

    `format` is by default qcow2 for a name that ends so, else raw. `iops` (a second) and `bandwidth` (bytes a second, or text
    such as "10M") bound reading and writing together. `bus` is what the guest finds it at: a virtio disk, an NVMe drive or a USB stick.
    """

    path: str | os.PathLike[str]
    format: Format | None = None
    readonly: bool = False
    iops: int | None = None
    bandwidth: int | str | None = None
    bus: Bus = "virtio"

    def __post_init__(self) -> None:
        path = str(Path(self.path).absolute())
        object.__setattr__(self, "path", path)
        if "\0" in path:
            raise InvalidSpec("a disk's path holds a NUL")
        kind = self.format or ("qcow2" if path.endswith(".qcow2") else "raw")
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
    def bytes_a_second(self) -> int | None:
        """`bandwidth` in numbers."""
        return None if self.bandwidth is None else int(self.bandwidth)


@dataclass(frozen=True)
class Served:
    """A device that a process of the host answers for, over a connected socket, while it lives."""

    kind: Literal["block", "char", "usb"]
    """block: an NBD server's other end. char: a stream of bytes. usb: the host's side of a redirected USB device."""
    readonly: bool = False
    disk: bool = False
    """Of usb: the guest finds a disk in it."""


@dataclass(frozen=True)
class Random:
    """A source of random numbers (virtio-rng), as QEMU's own generator gives them."""


Device = Disk | Served | Random


def check_name(name: str) -> str:
    """Return `name` if a device may have it. Raises InvalidSpec."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} is no name for a device", hint="a-z, 0-9 and -, at most 20, starting and ending with a letter or digit"
        )
    return name


def kind_of(device: Device) -> str:
    """Return what a device is, in a word: disk, block, char, usb or random."""
    return device.kind if isinstance(device, Served) else type(device).__name__.lower()
