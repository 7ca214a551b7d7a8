"""A file system mounted nowhere (fsopen(2), fsmount(2)): whoever has its descriptor can enter it, and it ends with that."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.core.errors import StorageError

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""The same everywhere."""
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6


@contextmanager
def mounted(device: Path, kind: str = "ext4") -> Iterator[int]:
    """Give a descriptor of the root of the file system on `device`, for root. Not read-only: one that is mounted elsewhere too is mounted
    in one way. Raises StorageError."""
    try:
        context = _call(_FSOPEN, kind.encode(), _CLOEXEC)
        try:
            _call(_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(device), 0)
            _call(_FSCONFIG, context, _CREATE, None, None, 0)
            mount = _call(_FSMOUNT, context, _CLOEXEC, 0)
        finally:
            os.close(context)
    except OSError as error:
        raise StorageError(f"{device} cannot be mounted: {error.strerror}") from error
    try:
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            yield root
        finally:
            os.close(root)
    finally:
        os.close(mount)


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result = int(libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
