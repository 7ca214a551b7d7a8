"""Opening the file behind a disk: what is handed to a jailed engine is a descriptor, and only of a file that stands for itself.

A qcow2 that names another file (a backing file, an external data file) is refused: the engine would be led to that one by what
is written in the first. Header as in QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from trivisor.core.devices import Disk
from trivisor.core.errors import InvalidSpec, NotFound, StorageError

HEADER = 104
_MAGIC = b"QFI\xfb"
_EXTERNAL_DATA = 1 << 2


def check_qcow2(header: bytes, path: str) -> int:
    """Return the virtual size (bytes) of the qcow2 that begins with `header`. Raises InvalidSpec for what leads elsewhere, or is none."""
    if len(header) < 72 or header[:4] != _MAGIC:
        raise InvalidSpec(f"{path} is not a qcow2", hint='give format="raw" if it is a disk as it lies')
    version, backing_offset, backing_size = struct.unpack_from(">IQI", header, 4)
    if version not in (2, 3):
        raise InvalidSpec(f"{path} is a qcow2 of version {version}, not 2 or 3")
    if backing_offset or backing_size:
        raise InvalidSpec(f"{path} has a backing file", hint=f"a disk must stand for itself: qemu-img rebase -b '' {path}")
    if version == 3 and len(header) < HEADER:
        raise InvalidSpec(f"{path} ends in its header")
    if version == 3 and struct.unpack_from(">Q", header, 72)[0] & _EXTERNAL_DATA:
        raise InvalidSpec(f"{path} keeps its data in another file", hint=f"a disk must stand for itself: qemu-img convert -O qcow2 {path}")
    if struct.unpack_from(">I", header, 32)[0]:
        raise InvalidSpec(f"{path} is encrypted", hint="decrypt it first: qemu-img convert")
    return int(struct.unpack_from(">Q", header, 24)[0])


def open_disk(disk: Disk) -> int:
    """Return a descriptor of the disk's file, for the caller to close. Raises NotFound, InvalidSpec, StorageError."""
    path = str(disk.path)
    try:
        # Without waiting: the other end of a fifo may never come.
        fd = os.open(path, (os.O_RDONLY if disk.readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no disk {path}", hint=f"make one: truncate -s 1G {path}, or qemu-img create -f qcow2 {path} 1G") from None
    except IsADirectoryError:
        raise InvalidSpec(f"{path} is a folder, not a disk", hint="folders are shared as volumes") from None
    except OSError as error:
        hint = "give readonly=True if it is not to be written" if not disk.readonly else ""
        raise StorageError(f"{path} cannot be opened: {error.strerror}", hint=hint) from error
    try:
        _check(disk, fd, path)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def opened(disk: Disk) -> Iterator[int]:
    """Give the descriptor that `open_disk` returns, closed at the end."""
    fd = open_disk(disk)
    try:
        yield fd
    finally:
        os.close(fd)


def _check(disk: Disk, fd: int, path: str) -> None:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidSpec(f"{path} is neither a file nor a block device")
    try:
        size = check_qcow2(os.pread(fd, HEADER, 0), path) if disk.format == "qcow2" else os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise InvalidSpec(f"{path} is an empty disk", hint=f"give it a size: truncate -s 1G {path}")


def identity(fd: int) -> tuple[int, int]:
    """Return what is one for all names of a file, or of a block device."""
    seen = os.fstat(fd)
    return (0, seen.st_rdev) if stat.S_ISBLK(seen.st_mode) else (seen.st_dev, seen.st_ino)
