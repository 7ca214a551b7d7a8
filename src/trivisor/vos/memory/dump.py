"""Writing a machine's physical memory to a file, in which each byte lies where it lies in the machine.

What is zero is left out and becomes a hole, and so does what is no memory, so the file takes of the disk what the machine has written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.vos.memory.physical import Physical
from trivisor.vos.ports import Ram

_PIECE = 32 << 20
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


def write(physical: Physical, runs: Iterable[Ram], path: Path, machine: str) -> int:
    """Write `runs` to the new file `path`, which only its owner may read; return its size. Raises StorageError, BadAddress.

    A file that could not be written to its end is removed.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "remove it, or take another name" if isinstance(error, FileExistsError) else ""
        raise StorageError(f"{path} cannot be made: {error.strerror}", machine=machine, hint=hint) from error
    end = 0
    try:
        for run in runs:
            for at in range(run.physical, run.physical + run.size, _PIECE):
                _piece(fd, physical, at, min(_PIECE, run.physical + run.size - at))
            end = max(end, run.physical + run.size)
        os.ftruncate(fd, end)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(f"{path} cannot be written: {error.strerror}", machine=machine, hint="free space") from error
        raise
    finally:
        os.close(fd)
    return end


def _piece(fd: int, physical: Physical, address: int, size: int) -> None:
    with physical.copy(address, size) as view:
        for offset in range(0, size, _BLOCK):
            with view.data[offset : offset + _BLOCK] as block:
                if block != _ZEROS[: len(block)]:
                    done = 0
                    while done < len(block):
                        done += os.pwrite(fd, block[done:], address + offset + done)
