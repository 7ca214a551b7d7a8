"""The socket by which a machine's tvinit reaches its keeper: bound before anything runs, so that nobody has to poll for it.

It lies in a folder of its own, which the machine sees: while the socket is moved out of there nobody can call (`shut`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.paths import MachineDir

NAME = "line"


def folder(machine: MachineDir) -> Path:
    """What the machine is shown."""
    return machine.root / "door"


def path(machine: MachineDir) -> Path:
    return folder(machine) / NAME


@contextlib.contextmanager
def bind(machine: MachineDir, owner: tuple[int, int]) -> Iterator[socket.socket]:
    """Bind it, for the machine's root alone, who is `owner` outside. Raises StorageError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            folder(machine).mkdir(mode=0o755, exist_ok=True)
            place = os.open(folder(machine), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(NAME, dir_fd=place)
                # Through the folder's descriptor: a path may be longer than a socket's address.
                listener.bind(f"/proc/self/fd/{place}/{NAME}")
                os.chmod(NAME, 0o600, dir_fd=place)
                if owner != (os.geteuid(), os.getegid()):
                    os.chown(NAME, *owner, dir_fd=place)
            finally:
                os.close(place)
        except OSError as error:
            raise StorageError(f"{path(machine)} cannot be made: {error.strerror}", machine=machine.root.name) from error
        yield listener


def shut(machine: MachineDir) -> None:
    """Have nobody be able to call until `unshut`. Raises StorageError."""
    _move(machine, path(machine), _away(machine))


def unshut(machine: MachineDir) -> None:
    """Take back `shut`; a door that is open stays so. Raises StorageError."""
    if _away(machine).exists():
        _move(machine, _away(machine), path(machine))


def ways(machine: MachineDir) -> tuple[str, str]:
    """Return what `unshut` renames, and to what."""
    return str(_away(machine)), str(path(machine))


def _away(machine: MachineDir) -> Path:
    return machine.root / "door.away"


def _move(machine: MachineDir, there: Path, to: Path) -> None:
    try:
        there.rename(to)
    except OSError as error:
        raise StorageError(f"{there} cannot be moved: {error.strerror}", machine=machine.root.name) from error
