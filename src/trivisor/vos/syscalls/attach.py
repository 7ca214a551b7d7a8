"""The way to a container's answerer (guest/PROTOCOL.md, "Answers"): a listener is borrowed from it, and calls are handed back to it.

A connection carries messages both ways. Requests wait for their reply, one at a time; "not mine" (B) may come between,
and is kept for the thread that serves calls. When this process dies, the connection ends, and the answerer refuses what
we held: it reads in the page that we share which notification was the last that we took.
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
import threading
import time
from collections import deque
from pathlib import Path

from trivisor.core.errors import GuestError, GuestGone, GuestProtocolError
from trivisor.vos import line
from trivisor.vos.syscalls.listener import ID, PID, Notification

REPLY_TIMEOUT = 10.0
"""Seconds that the answerer may take to open, mount or make something."""
_SEND_TIMEOUT = 1.0
_MESSAGE_MAX = 64 << 10
_REPLY = struct.Struct("<cIi")
_BACK = struct.Struct("<cQ")
_ERROR = struct.Struct("<ci")


class Attached:
    """A connection to the answerer. Thread-safe."""

    def __init__(self, connection: socket.socket, page: mmap.mmap, machine: str) -> None:
        connection.setblocking(False)
        self.machine = machine
        self.marks = memoryview(page).cast("Q")
        """[last id received, lowest id not yet answered], shared with the answerer."""
        self._connection = connection
        self._lock = threading.Lock()
        self._requests = itertools.count(1)
        self._back: deque[int] = deque()

    def fileno(self) -> int:
        return self._connection.fileno()

    def returned(self) -> list[int]:
        if self._lock.acquire(blocking=False):  # else a thread that waits for its reply reads what comes
            try:
                while self._take() is not None:
                    pass
            finally:
                self._lock.release()
        return [self._back.popleft() for _ in range(len(self._back))]

    def hand_off(self, raw: bytes, back: bool) -> None:
        self._send(b"H" + bytes([back]) + raw)

    def open(self, notification: Notification, dirfd: int, path: bytes, flags: int, mode: int, resolve: int) -> int:
        body = struct.pack("<QIiQQQ", notification[ID], notification[PID], dirfd, flags, mode, resolve) + _string(path)
        opened = self._request(b"P", body)
        if opened is None:
            raise GuestProtocolError("the answerer opened a file and did not hand it over", machine=self.machine)
        return opened

    def mount(self, notification: Notification, source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
        strings = b"".join(map(_string, (source, target, kind, data)))
        self._done(self._request(b"M", struct.pack("<QIQ", notification[ID], notification[PID], flags) + strings))

    def mknod(self, notification: Notification, dirfd: int, path: bytes, mode: int, device: int) -> None:
        head = struct.pack("<QIiIQ", notification[ID], notification[PID], dirfd, mode, device)
        self._done(self._request(b"N", head + _string(path)))

    def close(self) -> None:
        self._connection.close()

    # -- inside -----------------------------------------------------------------------------------

    @staticmethod
    def _done(fd: int | None) -> None:
        if fd is not None:
            os.close(fd)

    def _request(self, kind: bytes, body: bytes) -> int | None:
        """Send a request and return the descriptor that came with its reply. Raises OSError with what it failed with."""
        deadline = time.monotonic() + REPLY_TIMEOUT
        if len(body) > _MESSAGE_MAX - 16:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with self._lock:
            number = next(self._requests) & 0xFFFFFFFF
            self._send(kind + struct.pack("<I", number) + body)
            while True:
                self._wait(select.POLLIN, deadline)
                reply = self._take()
                if reply is None:
                    continue
                request, code, fd = reply
                if request == number and not code:
                    return fd
                self._done(fd)
                if request == number:
                    raise OSError(code, os.strerror(code))

    def _take(self) -> tuple[int, int, int | None] | None:
        """Take what has come, keeping what was handed back: a reply's request, errno and descriptor, or None if nothing is left."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._connection, 64, 1, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                raise GuestGone("the machine's answerer has gone", machine=self.machine) from error
            fd = fds[0] if fds else None
            if message[:1] == b"B" and len(message) == _BACK.size:
                self._back.append(_BACK.unpack(message)[1])
                self._done(fd)
            elif message[:1] == b"R" and len(message) >= _REPLY.size:
                _, request, code = _REPLY.unpack_from(message)
                return request, abs(code), fd
            else:
                self._done(fd)
                if message:
                    raise GuestProtocolError("the answerer sent what it may not", machine=self.machine)
                raise GuestGone("the machine's answerer has gone", machine=self.machine)

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
    """Borrow the listener that bears `token`. Raises GuestGone if there is no answerer, GuestError if it refuses."""
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
            raise GuestError(f"the program's calls cannot be answered: {os.strerror(code)}", machine=machine, hint="has it started?")
        raise GuestGone("the machine's answerer has gone", machine=machine)


def _string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text
