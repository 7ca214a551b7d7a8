"""Lines made of Python (CharDevice) in a container: a terminal at /dev/NAME, that any program of the machine opens by its name.

The guest's own command `device` makes it and carries its bytes over a line of its own (guest/PROTOCOL.md, "Builtins"), and two threads here
join that to the device's socket. The line is this process's: when it dies the guest ends the command, and the terminal is hung up and gone.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from trivisor.core.devices import Device
from trivisor.core.errors import AlreadyExists, FileError, GuestError, WaitTimeout
from trivisor.vmm.engine import Box
from trivisor.vos.files import Files
from trivisor.vos.line import Line
from trivisor.vos.process import Process
from trivisor.vos.processes import Processes

_START = 10.0
_PIECE = 65536
_LOOK = 0.5
"""Seconds after which a quiet line looks whether its socket has been closed: its reader may be waiting for the guest."""


class Chars:
    """The lines of one running container."""

    kinds = frozenset({"char"})

    def __init__(self, box: Box) -> None:
        self._box = box

    def modules(self, device: Device) -> tuple[str, ...]:
        return ()

    def plugged(self) -> set[str]:
        """Return the names below /dev that lead to terminals. Raises GuestError."""
        with self._files() as files:
            return {entry.name for entry in files.list("/dev") if (entry.info.target or "").startswith("/dev/pts/")}

    def place(self, name: str) -> str:
        return f"/dev/{name}"

    def plug(self, name: str, device: Device, fd: int | None) -> None:
        """Make /dev/NAME; `fd` is its socket, the caller's to close. Raises AlreadyExists, GuestError."""
        assert fd is not None
        line = Line.connect(self._box.dir.line, self._box.spec.name)
        try:
            process = Processes(lambda: line, self._box.spec.name).builtin(["device", name], stdin=True)
            if process.stdout.readline(timeout=_START) != b"there\n":
                raise self._refused(name, process)
            _Joined(socket.socket(fileno=os.dup(fd)), process, line).start()
        except BaseException:
            line.close()
            raise

    def unplug(self, name: str) -> None:
        """Remove /dev/NAME, which hangs up whoever has it open. Raises GuestError."""
        if name not in self.plugged():
            return
        with self._files() as files:
            try:
                files.remove(f"/dev/{name}")
            except FileError as error:
                if error.errno != errno.ENOENT:  # its owner may have died just now
                    raise

    @contextmanager
    def _files(self) -> Iterator[Files]:
        line = Line.connect(self._box.dir.line, self._box.spec.name)
        try:
            yield Files(Processes(lambda: line, self._box.spec.name))
        finally:
            line.close()

    def _refused(self, name: str, process: Process) -> Exception:
        code = process.wait(_START)
        machine = self._box.spec.name
        if code == errno.EEXIST:
            return AlreadyExists(f"the machine has a /dev/{name}", machine=machine, hint="give the device another name")
        said = process.stderr.read(4096).decode("utf-8", "replace").strip()
        return GuestError(f"/dev/{name} cannot be made: {said}", machine=machine)


class _Joined:
    """A device's socket and the guest's end of it, until either is closed."""

    def __init__(self, sock: socket.socket, process: Process, line: Line) -> None:
        self._socket = sock
        self._process = process
        self._line = line

    def start(self) -> None:
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def _run(self) -> None:
        writer = threading.Thread(target=self._to_guest, name="device", daemon=True)
        writer.start()
        with suppress(OSError, GuestError, ValueError):
            self._from_guest()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._line.close()
        writer.join(_START)
        self._socket.close()

    def _to_guest(self) -> None:
        with suppress(OSError, GuestError, ValueError):
            while data := self._socket.recv(_PIECE):
                self._process.stdin.write(data)
        # The guest kills what it ran for a line that has gone, and whoever reads from it here is told.
        self._line.close()

    def _from_guest(self) -> None:
        hangup = select.poll()
        hangup.register(self._socket, select.POLLRDHUP)
        while not hangup.poll(0):
            try:
                data = self._process.stdout.read(_PIECE, timeout=_LOOK)
            except WaitTimeout:
                continue
            if not data:
                return
            self._socket.sendall(data)
