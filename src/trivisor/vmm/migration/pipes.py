"""An image between the store and the link: written to a socket by a thread of its own, read from one into a file."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trivisor.core.errors import StorageError
from trivisor.core.units import GIB

_LOOK = 0.1
_PIECE = 1 << 20
_ROOM = GIB
"""Bytes that stay free of the disk on which an image is received."""


@contextmanager
def written(write: Callable[[BinaryIO], object], look: Callable[[], None]) -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """Give a socket from which comes what `write` writes, to its end, and what does that: it calls `look`, which may raise.

    The socket is the caller's. What `write` raises is raised there.
    """
    theirs, ours = socket.socketpair()
    failure: list[Exception] = []

    def run() -> None:
        try:
            with ours, ours.makefile("wb") as stream:
                write(stream)
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="sending an image", daemon=True)

    def wait() -> None:
        thread.start()
        while thread.is_alive():
            look()
            thread.join(_LOOK)
        if failure:
            raise failure[0]

    try:
        yield theirs, wait
    finally:
        # A thread that still writes gets an error now.
        with suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        ours.close()


def read(sock: socket.socket, target: Path, look: Callable[[int], None]) -> None:
    """Write what comes to the new file `target`, to its end; `look` is told of the bytes and may raise. Raises StorageError."""
    sock.settimeout(_LOOK)
    size = 0
    try:
        with target.open("xb") as out:
            while True:
                look(size)
                try:
                    data = sock.recv(_PIECE)
                except TimeoutError:
                    continue
                if not data:
                    return
                size += len(data)
                if shutil.disk_usage(target.parent).free < _ROOM:
                    raise StorageError("there is no room for the image", hint="free space, or set TRIVISOR_HOME to a larger disk")
                out.write(data)
    except OSError as error:
        raise StorageError(f"the image cannot be written: {error.strerror or error}") from error
