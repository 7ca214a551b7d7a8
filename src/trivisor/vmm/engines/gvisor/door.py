"""The socket by which a machine's tvinit reaches its keeper: bound before anything runs, so that nobody has to poll for it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.paths import MachineDir

_NAME = "door.sock"


def path(machine: MachineDir) -> Path:
    return machine.root / _NAME


@contextlib.contextmanager
def bind(machine: MachineDir, owner: tuple[int, int]) -> Iterator[socket.socket]:
    """Bind it, for the machine's root alone, who is `owner` outside. Raises StorageError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            folder = os.open(machine.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_NAME, dir_fd=folder)
                # Through the folder's descriptor: a path may be longer than a socket's address.
                listener.bind(f"/proc/self/fd/{folder}/{_NAME}")
                os.chmod(_NAME, 0o600, dir_fd=folder)
                if owner != (os.geteuid(), os.getegid()):
                    os.chown(_NAME, *owner, dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StorageError(f"{path(machine)} cannot be made: {error.strerror}", machine=machine.root.name) from error
        yield listener
