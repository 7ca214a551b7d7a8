"""A disk made of Python functions: subclass BlockDevice and attach an object of it.

The functions are called in a thread of this process, one call at a time, with ranges that lie in the disk and begin and end at a
sector. What they raise the guest gets as an I/O error (ENOSPC, EPERM and ENOMEM as such); so it does where they take longer than
`timeout`, or return what is no such range. When this process ends, or detaches the disk, the guest loses it.
"""

from __future__ import annotations

import errno
import socket
from collections import deque

from trivisor.core.devices import SECTOR, Served
from trivisor.core.errors import InvalidSpec
from trivisor.vos.devices.nbd import Command, Export, Request, Session, reply
from trivisor.vos.devices.serving import Server

KEPT = 16
MAX_TIMEOUT = 3600.0


class BlockDevice:
    """A disk of `size` bytes, whole sectors of 512. A subclass gives `read` and, unless it is `readonly`, `write`."""

    def __init__(self, size: int, *, readonly: bool = False, timeout: float = 5.0) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % SECTOR or size >= 1 << 62:
            raise InvalidSpec(f"a disk's size is whole sectors of {SECTOR} bytes, not {size!r}")
        if not 0 < timeout <= MAX_TIMEOUT:
            raise InvalidSpec(f"timeout must be seconds, more than 0 and at most {MAX_TIMEOUT:g}, not {timeout!r}")
        self.size = size
        self.readonly = readonly
        self.timeout = timeout
        """Seconds that a function may take."""
        self.faults: deque[BaseException] = deque(maxlen=KEPT)
        """What the functions raised last, the connection's own faults among them."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        """Keep `data` at `offset`."""
        raise OSError(errno.EPERM, "this disk cannot be written")

    def flush(self) -> None:
        """Make sure that what was written stays, whatever happens."""

    def trim(self, offset: int, length: int) -> None:
        """Learn that the guest has no use for that range any more."""

    def served(self) -> Served:
        """Return what the machine is told about it."""
        return Served("block", self.readonly)

    def serve(self, sock: socket.socket, name: str = "") -> Server[Request]:
        """Answer on `sock`, which is the server's from now on."""
        server = Server(sock, Session(Export(self.size, self.readonly)), self._answer, self.timeout, self.faults.append)
        server.start()
        return server

    def _answer(self, request: Request) -> bytes:
        if request.command is Command.READ:
            return reply(request.cookie, 0, exactly(self.read(request.offset, request.length), request.offset, request.length))
        if request.command is Command.WRITE:
            self.write(request.offset, request.data)
            if request.fua:
                self.flush()
        elif request.command is Command.TRIM:
            self.trim(request.offset, request.length)
        else:
            self.flush()
        return reply(request.cookie)


def exactly(data: object, offset: int, length: int) -> bytes:
    """Return what `read(offset, length)` returned. Raises ValueError for what is no such range."""
    if not isinstance(data, bytes | bytearray | memoryview) or memoryview(data).nbytes != length:
        raise ValueError(f"read({offset}, {length}) returned {type(data).__name__} that is not {length} bytes")
    return bytes(data)
