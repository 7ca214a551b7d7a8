"""Loop devices (loop(4)): a file as a disk, for as long as somebody has it open or mounted.

A device is made with LO_FLAGS_AUTOCLEAR: the kernel lets go of it with its last user, so that whatever is killed leaves
nothing to take down. A file never gets a second device while it has one, which would be two file systems writing to the same blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trivisor.core.errors import HostLacks, StorageError

_CONTROL = Path("/dev/loop-control")
_LOOP_CONFIGURE, _LOOP_GET_STATUS64, _LOOP_SET_CAPACITY, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C05, 0x4C07, 0x4C82
_AUTOCLEAR = 4
_INFO = struct.Struct("=QQQQQIIII64s64s32s16x")
"""struct loop_info64."""
_CONFIG = struct.Struct(f"=II{_INFO.size}s64x")
"""struct loop_config."""
_TRIES = 64
"""Others may take a free device before us, and a device may go away while we look at it."""


def check() -> None:
    """Raise HostLacks if there can be no loop devices here."""
    if os.geteuid() != 0:
        raise HostLacks("a disk of its own needs root, to mount it", hint='run as root, or give disk="ram"')
    try:
        with ExitStack() as stack:
            control = _open(_CONTROL, os.O_RDWR, stack)
            _open(_device(fcntl.ioctl(control, _LOOP_CTL_GET_FREE)), os.O_RDWR, stack)
    except OSError as error:
        raise HostLacks(
            f"there are no loop devices here: {error.filename or _CONTROL}: {error.strerror}",
            hint="modprobe loop; in a container, run it with --privileged and the host's /dev",
        ) from error


@contextmanager
def attached(file: Path) -> Iterator[Path]:
    """Give the device that `file` is, there until the `with` ends and whatever mounted it has ended. Raises StorageError."""
    try:
        with ExitStack() as stack:
            backing = _open(file, os.O_RDWR, stack)
            for _ in range(_TRIES):
                if device := _of(backing, stack) or _configure(backing, stack):
                    break
            else:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(file))
            # One that it was already knows the size that the file had then.
            fcntl.ioctl(_open(device, os.O_RDWR, stack), _LOOP_SET_CAPACITY)
            yield device
    except OSError as error:
        raise StorageError(f"{file} cannot be made a loop device: {error.strerror}", hint="see `losetup --list`") from error


def _of(backing: int, stack: ExitStack) -> Path | None:
    """Return the device that the file is already: of a machine that is just about to have ended. Its open end is put on the stack."""
    file = os.fstat(backing)
    for place in Path("/sys/block").glob("loop*/loop"):
        device = Path("/dev") / place.parent.name
        with suppress(OSError), ExitStack() as opened:
            fd = _open(device, os.O_RDWR, opened)
            about = _INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size)))
            if about[:2] == (file.st_dev, file.st_ino):
                stack.push(opened.pop_all())
                return device
    return None


def _configure(backing: int, stack: ExitStack) -> Path | None:
    """Make the file a free device; None if somebody else was faster."""
    with ExitStack() as opened:
        device = _device(fcntl.ioctl(_open(_CONTROL, os.O_RDWR, opened), _LOOP_CTL_GET_FREE))
        fd = _open(device, os.O_RDWR, opened)
        info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR, b"", b"", b"")
        try:
            fcntl.ioctl(fd, _LOOP_CONFIGURE, _CONFIG.pack(backing, 0, info))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return None
            raise
        stack.push(opened.pop_all())
        return device


def _device(number: int) -> Path:
    return Path(f"/dev/loop{number}")


def _open(path: Path, flags: int, stack: ExitStack) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
