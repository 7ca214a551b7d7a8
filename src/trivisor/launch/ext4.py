"""An ext4 of ours made larger: while something has it mounted, or in a file that nothing uses.

While it is mounted the kernel does it, through any mount of that file system (EXT4_IOC_RESIZE_FS), for who has CAP_SYS_RESOURCE. A
machine's own mounts are where nobody else sees them, so it is mounted once more, at no place at all: fsmount(2) gives a descriptor, and the
mount ends with that. Otherwise it is e2fsprogs' work, which wants it checked before.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.process import find, run
from trivisor.launch import syscalls

BLOCK = 4096
_RESIZE = 0x40086610
"""_IOW('f', 16, __u64) of fs/ext4/ext4.h."""
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6
_ATTRIBUTES = 2 | 4 | 8
"""MOUNT_ATTR_NOSUID, NODEV, NOEXEC."""
_SUPERBLOCK, _MAGIC = 1024, 0xEF53
_SYS_RESOURCE = 24
_TIMEOUT = 600.0
_MENDED = 1
"""e2fsck(8): errors were corrected, a journal among them."""


def able() -> bool:
    """Whether this process may have the kernel make one larger that is in use."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        mask = next((line.split()[1] for line in status if line.startswith("CapEff:")), "0")
    return bool(int(mask, 16) >> _SYS_RESOURCE & 1)


def size(file: Path) -> int:
    """Return the bytes that the ext4 in `file` takes of it, as it was last written. Raises StorageError."""
    try:
        with file.open("rb") as stream:
            head = os.pread(stream.fileno(), 1024, _SUPERBLOCK)
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    if len(head) < 1024 or struct.unpack_from("<H", head, 56)[0] != _MAGIC:
        raise StorageError(f"{file} is no file system", hint="delete the machine")
    blocks, shift = struct.unpack_from("<I", head, 4)[0], struct.unpack_from("<I", head, 24)[0]
    return int(blocks << (10 + min(shift, 6)))


def grow_file(file: Path, size: int) -> None:
    """Make the ext4 in `file`, which nothing has mounted and which has as much room, `size` bytes. Raises HostLacks, StorageError."""
    try:
        try:
            run([find("e2fsck", "e2fsprogs"), "-f", "-p", file], timeout=_TIMEOUT)
        except EngineError as error:
            if error.status != _MENDED:
                raise
        run([find("resize2fs", "e2fsprogs"), file, f"{size // 1024}K"], timeout=_TIMEOUT)
    except EngineError as error:
        raise StorageError(f"the file system in {file} cannot be made larger: {error}", hint="the machine has its old size") from error


def grow(device: Path, size: int) -> None:
    """Make the ext4 on `device`, which is in use and has as much room, `size` bytes. As large already is no error. Raises StorageError."""
    try:
        mount = _mounted(device)
        try:
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
            try:
                fcntl.ioctl(folder, _RESIZE, struct.pack("=Q", size // BLOCK))
            finally:
                os.close(folder)
        finally:
            os.close(mount)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else ""
        raise StorageError(f"the file system on {device} cannot be made larger: {error.strerror}", hint=hint) from error


def _mounted(device: Path) -> int:
    context = _call("fsopen", b"ext4", _CLOEXEC)
    try:
        _call("fsconfig", context, _SET_STRING, b"source", os.fsencode(device), 0)
        _call("fsconfig", context, _CREATE, None, None, 0)
        return _call("fsmount", context, _CLOEXEC, _ATTRIBUTES)
    finally:
        os.close(context)


def _call(name: str, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result = int(libc.syscall(ctypes.c_long(syscalls.table()[name]), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
