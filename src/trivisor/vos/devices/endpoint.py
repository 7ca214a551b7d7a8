"""Unix sockets of the host's at which a device of a guest can be met."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from trivisor.core.errors import AlreadyExists, StorageError


def listen(path: str) -> socket.socket:
    """Listen at `path`, for the caller's user alone, instead of a socket whose listener is gone. Raises AlreadyExists, StorageError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        folder, name = os.path.split(path)
        at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Through the folder's descriptor: a path may be longer than a socket's address.
            address = f"/proc/self/fd/{at}/{name}"
            _clear(path, address)
            made.bind(address)
            os.chmod(name, 0o600, dir_fd=at)
            made.listen(1)
        finally:
            os.close(at)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"there is something at {path} already", hint="give another path, or remove it") from error
        raise StorageError(f"{path} cannot be listened at: {error.strerror}") from error
    except BaseException:
        made.close()
        raise
    return made


def forget(path: str) -> None:
    """Remove a socket's name if nobody listens there any more."""
    folder, name = os.path.split(path)
    with suppress(OSError):
        at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _clear(path, f"/proc/self/fd/{at}/{name}")
        finally:
            os.close(at)


def remove(path: str) -> None:
    """Remove a socket's name, if it is one."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            Path(path).unlink()


def _clear(path: str, address: str) -> None:
    """Remove a socket whose listener is gone."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as trial:
            trial.settimeout(1.0)
            try:
                trial.connect(address)
            except (ConnectionRefusedError, FileNotFoundError):
                Path(path).unlink()
            except OSError:
                return  # somebody listens, and has enough callers
