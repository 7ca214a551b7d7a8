"""What the header of a disk image says: how large the disk is, and that it stands for itself.

A backing file, a parent, an extent in another file are refused before any program opens the image: it would be led there. So is what
these few bytes leave open. Read are some kilobytes, at places that are bounded (QEMU's docs/interop/qcow2.txt; VMware's Virtual Disk
Format 5.0; Microsoft's VHD specification and [MS-VHDX]; VirtualBox's VDICore.h).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from trivisor.core.errors import ImageError, InvalidSpec, NotFound
from trivisor.images.disks.formats import DESCRIPTOR, SECTOR, VHD, Format, told

_HEAD = 4096
_TEXT = 64 << 10
"""Of a VMDK's description; those that there are have some hundred bytes."""
_VHDX_TABLE = 64 << 10
_VHDX_REGIONS = (192 << 10, 256 << 10)
_METADATA = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
_BAT = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
_FILE_PARAMETERS = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
_VIRTUAL_SIZE = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
_HAS_PARENT = 2
_QCOW2_DATA, _QCOW2_CORRUPT, _QCOW2_KNOWN = 1 << 2, 1 << 1, 0b11111
_DYNAMIC, _FIXED, _DIFFERENCING = 3, 2, 4
_VDI_NORMAL, _VDI_FIXED, _VDI_DIFFERENCING = 1, 2, 4
_GD_AT_END = (1 << 64) - 1
_PARENT_AT = SECTOR
"""Where readers look for a VMDK's parent, wherever its header says that the description is."""
_FLATTEN = "a disk must stand for itself: have its own program write it whole (clone, flatten, merge)"


@dataclass(frozen=True)
class Header:
    """What a file says of the disk in it."""

    format: Format
    size: int
    """Bytes, as a machine sees them."""


class _File:
    """A file that is read at places that it names itself."""

    def __init__(self, path: Path, fd: int) -> None:
        self.name = path.name
        self._fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def read(self, place: int, length: int) -> bytes:
        """Return up to `length` bytes; none beyond the end."""
        return os.pread(self._fd, length, place) if 0 <= place < self.size else b""

    def wrong(self, what: str, hint: str = "") -> ImageError:
        return ImageError(f"{self.name}: {what}", hint=hint)

    def elsewhere(self, what: str) -> ImageError:
        return ImageError(f"{self.name}: {what}", hint=_FLATTEN)

    def unpack(self, form: str, data: bytes, place: int = 0) -> tuple[int, ...]:
        """Return numbers of a header. Raises ImageError if it ends before them."""
        if len(data) < place + struct.calcsize(form):
            raise self.wrong("it ends in its header", "copy it again")
        found: tuple[int, ...] = struct.unpack_from(form, data, place)
        return found


def read(path: Path, wanted: Format | None = None) -> Header:
    """Return what the disk in the file is. `wanted`: the format that it has; "raw" takes any file for a disk as it lies.

    Raises NotFound, InvalidSpec (no file, or not of the format that is wanted), ImageError (it needs another file, or is damaged).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no disk {path}") from None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    try:
        if not os.path.isfile(path):  # noqa: PTH113 - of a path as it was given
            raise InvalidSpec(f"{path} is not a file", hint="a disk image is a file")
        return _header(_File(path, fd), wanted)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _header(file: _File, wanted: Format | None) -> Header:
    head, tail = file.read(0, _HEAD), file.read(max(0, file.size - SECTOR), SECTOR)
    kind = wanted if wanted == "raw" else told(head[:SECTOR], tail)
    if wanted is not None and kind != wanted:
        raise InvalidSpec(f"{file.name} is {kind}, not {wanted}", hint="leave out the format, or name the one that it has")
    size = _READERS[kind](file, head)
    if size <= 0:
        raise file.wrong("it is an empty disk")
    return Header(kind, size)


def _raw(file: _File, _head: bytes) -> int:
    return -(-file.size // SECTOR) * SECTOR


def _qcow2(file: _File, head: bytes) -> int:
    version, backing, length = file.unpack(">IQI", head, 4)
    (size,), (method,) = file.unpack(">Q", head, 24), file.unpack(">I", head, 32)
    file.unpack(">Q", head, 64)
    if version not in (2, 3):
        raise file.wrong(f"a qcow2 of version {version}, not 2 or 3", "have its own program write it anew")
    if backing or length:
        raise file.elsewhere("it has a backing file")
    if method:
        raise file.wrong("it is encrypted", "decrypt it first")
    features = file.unpack(">Q", head, 72)[0] if version == 3 else 0
    if features & _QCOW2_DATA:
        raise file.elsewhere("it keeps its data in another file")
    if features & _QCOW2_CORRUPT:
        raise file.wrong("it is marked as damaged", "mend it: qemu-img check -r all")
    if features & ~_QCOW2_KNOWN:
        raise file.wrong(f"it has features that are not known here ({features:#x})", "have its own program write it anew")
    return size


def _vmdk(file: _File, head: bytes) -> int:
    if not head.startswith(b"KDMV"):
        what = "a part of a disk, or a snapshot of one (COWD)" if head.startswith(b"COWD") else "it is the description of other files"
        raise file.wrong(
            what, "give the file with the data: NAME-flat.vmdk, with the format raw; or have it exported as one file, or as OVA"
        )
    version, _flags, capacity, _grain, place, sectors = file.unpack("<IIQQQQ", head, 4)
    if not 1 <= version <= 3:
        raise file.wrong(f"a VMDK of version {version}, not 1 to 3")
    if not capacity:
        # Readers then take the description for all there is, and follow it.
        raise file.elsewhere("it says that it holds nothing")
    if file.unpack("<Q", head, 56)[0] == _GD_AT_END:
        end = file.read(file.size - 2 * SECTOR, SECTOR)
        if not end.startswith(b"KDMV") or file.unpack("<Q", end, 12)[0] != capacity:
            raise file.wrong("it was cut, its end is missing", "copy it again")
    if sectors * SECTOR > _TEXT or (sectors and place * SECTOR >= file.size):
        raise file.wrong("its description is too long, or outside of it")
    texts = [file.read(place * SECTOR, sectors * SECTOR) if place and sectors else b"", file.read(_PARENT_AT, _TEXT)]
    for text in (part.split(b"\0")[0].decode("latin-1") for part in texts):
        if text.encode("latin-1").lstrip().startswith(DESCRIPTOR) or "parentFileNameHint" in text:
            _described(file, text)
    return capacity * SECTOR


def _described(file: _File, text: str) -> None:
    """Check the description inside of a VMDK that has its data beside it."""
    parent = re.search(r"^\s*parentCID\s*=\s*([0-9a-fA-F]{1,16})", text, re.MULTILINE)
    if (parent and int(parent[1], 16) != 0xFFFFFFFF) or "parentFileNameHint" in text:
        raise file.elsewhere("it has a parent")
    extents = re.findall(r"^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+(\w+)", text, re.MULTILINE)
    if len(extents) > 1 or any(kind != "SPARSE" for kind in extents):
        raise file.elsewhere("it keeps its data in other files")


def _vhd(file: _File, head: bytes) -> int:
    tail = file.read(file.size - SECTOR, SECTOR)
    if not tail.startswith(VHD):
        raise file.wrong("it was cut, its end is missing", "copy it again")
    footer = head if head.startswith(VHD) else tail
    (size,), (kind,) = file.unpack(">Q", footer, 48), file.unpack(">I", footer, 60)
    if _DIFFERENCING in (kind, file.unpack(">I", tail, 60)[0]):
        raise file.elsewhere("it has a parent")
    if kind != (_DYNAMIC if footer is head else _FIXED):
        raise file.wrong(f"a VHD of type {kind}, which is neither fixed nor dynamic")
    return size


def _vdi(file: _File, head: bytes) -> int:
    (version, _length, kind), (size,) = file.unpack("<III", head, 68), file.unpack("<Q", head, 0x170)
    if version != 0x00010001:
        raise file.wrong(f"a VDI of version {version >> 16}.{version & 0xFFFF}, not 1.1")
    if kind == _VDI_DIFFERENCING or any(head[0x1A8:0x1C8]):
        raise file.elsewhere("it has a parent")
    if kind not in (_VDI_NORMAL, _VDI_FIXED):
        raise file.wrong(f"a VDI of type {kind}, which is neither fixed nor dynamic")
    (data,), (block, extra, blocks, used) = file.unpack("<I", head, 0x158), file.unpack("<IIII", head, 0x178)
    if used > blocks or data + used * (block + extra) > file.size:
        raise file.wrong("it was cut: not all of its blocks are there", "copy it again")
    return size


def _vhdx(file: _File, _head: bytes) -> int:
    for place in _VHDX_REGIONS:
        table = file.read(place, _VHDX_TABLE)
        if table.startswith(b"regi"):
            break
    else:
        raise file.wrong("it has no table of regions", "copy it again")
    regions = _regions(file, table)
    metadata = file.read(regions, _VHDX_TABLE)
    if not metadata.startswith(b"metadata"):
        raise file.wrong("it has no metadata", "copy it again")
    found: dict[bytes, bytes] = {}
    (count,) = file.unpack("<H", metadata, 10)
    for number in range(min(count, 2047)):
        at = 32 + 32 * number
        offset, length = file.unpack("<II", metadata, at + 16)
        if length <= _HEAD:
            found[metadata[at : at + 16]] = file.read(regions + offset, length)
    _block, flags = file.unpack("<II", found.get(_FILE_PARAMETERS, b""))
    if flags & _HAS_PARENT:
        raise file.elsewhere("it has a parent")
    return file.unpack("<Q", found.get(_VIRTUAL_SIZE, b""))[0]


def _regions(file: _File, table: bytes) -> int:
    """Return where a VHDX's metadata are; a region that it needs and that is not known is refused."""
    (count,) = file.unpack("<I", table, 8)
    metadata = 0
    for number in range(min(count, 2047)):
        at = 16 + 32 * number
        offset, _length, needed = file.unpack("<QII", table, at + 16)
        name = table[at : at + 16]
        if name == _METADATA:
            metadata = offset
        elif name != _BAT and needed & 1:
            raise file.wrong(f"it needs a region that is not known here ({UUID(bytes_le=name)})")
    if not metadata:
        raise file.wrong("it has no metadata", "copy it again")
    return metadata


_READERS: dict[Format, Callable[[_File, bytes], int]] = {
    "raw": _raw,
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vhdx": _vhdx,
    "vdi": _vdi,
}
