"""How folders are laid out on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
"""ioctl_iflags(2)."""
_TOPDIR = 0x00020000


def scatter(folder: Path) -> None:
    """Have the folders in this one lie far apart on the disk, if its file system can be told (ext4: T of chattr(1)). Raises OSError.

    ext4 gives nobody the number of a file that was deleted seconds ago, and looks at all of those again for each file that is made
    near them: 10,000 files, made where as many had just been deleted, took 1 s instead of 0.2.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("l"))))
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", flags | _TOPDIR))
    finally:
        os.close(fd)
