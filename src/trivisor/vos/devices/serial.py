"""A serial port whose other end is of this process: a file, or a pseudo-terminal that any program of the host may open.

The port is a 16550 on a PCI card (/dev/ttySN in the guest). One thread carries both ways; it ends, and closes what it opened, when
the port is detached or the machine ends.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import tty
from contextlib import suppress
from typing import Protocol

from trivisor.core.devices import Served
from trivisor.core.errors import InvalidSpec
from trivisor.vos.devices.char import CharDevice, CharLine

_READ = 4096


class HasFileno(Protocol):
    """An open file, pipe, socket or terminal."""

    def fileno(self) -> int: ...


class Serial(CharDevice):
    """A serial port. What the guest writes goes to `file`, and what can be read there goes to the guest, as far as it is open for either.

    `file` is an open file of the operating system; it stays the caller's to close. Without one a pseudo-terminal is made, whose path is
    `path` while it is attached; what the guest says while nobody reads it is lost. A subclass that gives `receive` needs
    neither, and has `send`. Raises InvalidSpec.
    """

    def __init__(self, file: HasFileno | None = None) -> None:
        super().__init__()
        self.path = ""
        """Of a pseudo-terminal: where programs of the host find it."""
        self._file = file
        if file is not None:
            try:
                file.fileno()
            except (AttributeError, OSError) as error:
                raise InvalidSpec(f"{file!r} is no open file", hint="subclass Serial and give receive() for anything else") from error

    def served(self) -> Served:
        return Served("serial")

    def serve(self, sock: socket.socket, name: str = "") -> CharLine:
        own: list[int] = []
        if type(self).receive is Serial.receive:
            if self._file is not None:
                own.append(os.dup(self._file.fileno()))
            else:
                own += os.openpty()
                # Our end of the terminal's program side stays open: one that nobody has open reads as hung up.
                tty.setraw(own[1])
                os.set_blocking(own[0], False)
                self.path = os.ttyname(own[1])
        self._line = _SerialLine(sock, self, own)
        self._line.start()
        return self._line


class _SerialLine(CharLine):
    """The host's end of one attached Serial. `own`: the file's descriptor first, and what else is to be closed."""

    def __init__(self, sock: socket.socket, device: Serial, own: list[int]) -> None:
        super().__init__(sock, device)
        self._own = own

    def _run(self) -> None:
        if not self._own:
            super()._run()
            return
        try:
            self._carry(self._own[0])
        except Exception as error:
            self._device.faults.append(error)
        finally:
            self._socket.close()
            for fd in self._own:
                os.close(fd)

    def _carry(self, fd: int) -> None:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        readable, waiting = mode != os.O_WRONLY, b""
        poll = select.poll()
        while True:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if waiting else 0))
            # What was read and not taken yet is all that is held.
            if readable and not waiting:
                poll.register(fd, select.POLLIN)
            else:
                with suppress(KeyError):
                    poll.unregister(fd)
            found = dict(poll.poll())
            if found.get(self._socket.fileno(), 0) & ~select.POLLOUT:
                data = self._socket.recv(_READ)
                if not data:
                    return
                if mode != os.O_RDONLY:
                    _write(fd, data)
            if waiting and found.get(self._socket.fileno(), 0) & select.POLLOUT:
                waiting = waiting[self._socket.send(waiting, socket.MSG_DONTWAIT) :]
            if fd in found and readable and not waiting:
                waiting = _read(fd)
                readable = bool(waiting)


def _read(fd: int) -> bytes:
    """Return what is there; nothing at its end, or where a terminal's other end is gone."""
    with suppress(OSError):
        return os.read(fd, _READ)
    return b""


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    with suppress(BlockingIOError):  # a terminal that nobody reads
        while view:
            view = view[os.write(fd, view) :]
