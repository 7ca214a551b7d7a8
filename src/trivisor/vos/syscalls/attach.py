"""The way to a container's answerer (guest/PROTOCOL.md, "Answers"): a listener is borrowed from it, and calls are handed back to it.

A connection carries messages both ways and nobody waits on it: what the answerer was asked to do for a program is remembered with
its request, and the serving thread finishes it when the reply comes. When this process dies, the connection ends, and the
answerer refuses what we held: it reads in the page that we share which notification was the last that we took.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import CallGone, GuestError, GuestGone, GuestProtocolError
from trivisor.vos import line
from trivisor.vos.syscalls.behalf import Wish
from trivisor.vos.syscalls.listener import Returned

_SEND_TIMEOUT = 1.0
_MESSAGE_MAX = 64 << 10
_REPLY = struct.Struct("<cIi")
_BACK = struct.Struct("<cQ")
_ERROR = struct.Struct("<ci")


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request: an errno, or 0 and perhaps a descriptor, which is the receiver's to close."""

    wish: Wish
    errno: int
    fd: int | None


class Attached:
    """A connection to the answerer. Requests come from any thread, replies are taken by one."""

    def __init__(self, connection: socket.socket, page: mmap.mmap, machine: str) -> None:
        connection.setblocking(False)
        self.machine = machine
        self.marks = memoryview(page).cast("Q")
        """[last id received, lowest id not yet answered], shared with the answerer."""
        self._connection = connection
        self._requests = itertools.count(1)
        self._wishes: dict[int, Wish] = {}

    def fileno(self) -> int:
        return self._connection.fileno()

    def take(self) -> Iterator[Returned | Reply]:
        """Yield what has come. Raises GuestGone at the end, GuestProtocolError."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._connection, 64, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise GuestGone("the machine's answerer has gone", machine=self.machine) from error
            fd = fds[0] if fds else None
            if message[:1] == b"R" and len(message) == _REPLY.size:
                _, request, code = _REPLY.unpack(message)
                wish = self._wishes.pop(request, None)
                if wish is not None:
                    yield Reply(wish, abs(code), fd)
                    continue
            if fd is not None:
                os.close(fd)
            if message[:1] in (b"B", b"D") and len(message) == _BACK.size:
                yield Returned(_BACK.unpack(message)[1], message[:1] == b"D")
            elif message[:1] != b"R":
                raise (
                    GuestProtocolError("the answerer sent what it may not", machine=self.machine)
                    if message
                    else GuestGone("the machine's answerer has gone", machine=self.machine)
                )

    def abandoned(self) -> list[Wish]:
        """Return the wishes that no reply will come to any more, once."""
        return [self._wishes.pop(request) for request in list(self._wishes)]

    def ask(self, wish: Wish) -> None:
        """Have something done for a program. Raises OSError if nobody will."""
        request = next(self._requests) & 0xFFFFFFFF
        message = wish.what.encode() + struct.pack("<I", request) + wish.body
        if len(message) > _MESSAGE_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        self._wishes[request] = wish
        try:
            self._send(message)
        except BaseException:
            self._wishes.pop(request, None)
            raise

    def hand_off(self, raw: bytes, back: bool) -> None:
        self._send(b"H" + bytes([back]) + raw)

    def close(self) -> None:
        self._connection.close()

    def _send(self, message: bytes) -> None:
        deadline = time.monotonic() + _SEND_TIMEOUT
        while True:
            try:
                self._connection.send(message, socket.MSG_NOSIGNAL)
                return
            except (BlockingIOError, InterruptedError):
                self._wait(select.POLLOUT, deadline)

    def _wait(self, events: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._connection, events)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise OSError(errno.ETIMEDOUT, "the machine's answerer does not answer")


def attach(path: Path, token: bytes, machine: str, timeout: float) -> tuple[int, Attached]:
    """Borrow the listener that bears `token`. Raises GuestGone without an answerer, CallGone if all has ended, GuestError."""
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.settimeout(timeout)
        shared = os.memfd_create("marks", os.MFD_CLOEXEC)
        undo.callback(os.close, shared)
        os.ftruncate(shared, mmap.PAGESIZE)
        try:
            line.dial(connection, path)
            socket.send_fds(connection, [b"A" + token], [shared])
            message, fds, _, _ = socket.recv_fds(connection, 64, 1)
        except OSError as error:
            raise GuestGone(f"the machine's answerer does not answer: {error.strerror or error}", machine=machine) from error
        if message[:1] == b"O" and fds:
            page = mmap.mmap(shared, mmap.PAGESIZE)
            undo.pop_all()
            os.close(shared)
            return fds[0], Attached(connection, page, machine)
        for fd in fds:
            os.close(fd)
        if message[:1] == b"E" and len(message) == _ERROR.size:
            code = abs(_ERROR.unpack(message)[1])
            if code == errno.ESRCH:
                raise CallGone("the programs whose calls were to be answered have ended", machine=machine)
            raise GuestError(f"the program's calls cannot be answered: {os.strerror(code)}", machine=machine, hint="has it started?")
        raise GuestGone("the machine's answerer has gone", machine=machine)
