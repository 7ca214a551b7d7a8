"""The formats of disk images: what they are called, and which one a file has.

No program is asked: a program that guesses a format, and follows what it finds in it, is what a hostile disk is made for. The first and
last bytes are read here, and headers.py then says what they mean.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from trivisor.core.errors import ImageError, InvalidSpec, NotFound

Format = Literal["raw", "qcow2", "vmdk", "vhdx", "vhd", "vdi"]
FORMATS: tuple[Format, ...] = get_args(Format)
DRIVERS: dict[Format, str] = {"vhd": "vpc"}
"""What QEMU calls those that have another name there."""
SECTOR = 512
VHD = b"conectix"
DESCRIPTOR = b"# Disk DescriptorFile"
_SUFFIXES: dict[str, Format] = {"img": "raw", "raw": "raw", "vpc": "vhd", **{name: name for name in FORMATS}}


def checked(name: str) -> Format:
    """Return the format called `name`. Raises InvalidSpec."""
    for known in FORMATS:
        if name == known:
            return known
    raise InvalidSpec(f"there is no format {name!r} of disks", hint=f"it is one of {', '.join(FORMATS)}")


def of_name(path: Path) -> Format:
    """Return the format that a file's name says. Raises InvalidSpec."""
    found = _SUFFIXES.get(path.suffix.lower().removeprefix("."))
    if found is None:
        raise InvalidSpec(f"{path.name}: its name says no format of disks", hint=f"give one of {', '.join(FORMATS)}")
    return found


def detect(path: Path) -> Format:
    """Return the format of a file by its content; what is none of the others is raw. Raises NotFound, ImageError."""
    try:
        with path.open("rb") as file:
            head = file.read(SECTOR)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - SECTOR))
            tail = file.read(SECTOR)
    except FileNotFoundError:
        raise NotFound(f"there is no disk {path}") from None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return told(head, tail)


def told(head: bytes, tail: bytes) -> Format:
    """Return the format of what begins with `head` and ends in `tail`, a sector each."""
    if head.startswith(b"QFI\xfb"):
        return "qcow2"
    if head.startswith((b"KDMV", b"COWD")) or DESCRIPTOR in head:
        return "vmdk"
    if head.startswith(b"vhdxfile"):
        return "vhdx"
    if head.startswith(VHD) or tail.startswith(VHD):
        return "vhd"
    return "vdi" if head[64:68] == b"\x7f\x10\xda\xbe" else "raw"
