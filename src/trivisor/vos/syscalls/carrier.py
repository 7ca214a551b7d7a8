"""The builtin of a virtual machine that carries a listener: messages to and fro, requests and their replies.

Messages are those of guest/PROTOCOL.md, "Answers", "Remote". All that comes is hostile: a malformed message, as `take` finds it or we
do, ends the carrier, and the guest then fails all calls closed.

To fork a builtin is what an attach takes longest for, so one that has carried a listener to its end waits for the next (Spares).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import threading
from collections.abc import Callable

from trivisor.core.errors import GuestError, GuestGone, GuestProtocolError, WaitTimeout
from trivisor.vos.process import Process

REPLY_TIMEOUT = 10.0
MAX_MESSAGE = 1 << 20
_SEND_TIMEOUT = 5.0
_READ = 256 << 10
_HEAD = struct.Struct("<IB")

Spares = list[Process]
"""Builtins of one machine that wait for a token. Appended to and popped from without a lock."""
MAX_SPARES = 4


class _Reply:
    """What one request waits for."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self.errno = errno.EIO
        self.data = b""


class Carrier:
    """One builtin, for as long as it carries one listener."""

    def __init__(
        self, process: Process, machine: str, take: Callable[[int, bytes], None], ended: Callable[[], None], spares: Spares | None
    ) -> None:
        """Take over `process`. On a thread of ours `take(kind, body)` gets what is no reply, and `ended()` is called once after the last.

        `spares` gets the builtin when it rests again.
        """
        self.machine = machine
        self.over = False
        """Nothing goes to the builtin any more."""
        self._process = process
        self._take = take
        self._ended = ended
        self._spares = spares
        self._rests: int | None = None
        """The errno that the builtin rests with, once it does."""
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._replies: dict[int, _Reply] = {}
        self._reader = threading.Thread(target=self._read_all, name=f"calls from {machine}", daemon=True)

    def start(self, token: bytes, ahead: bytes) -> None:
        """Begin to read, and say what is to be read ahead; to a builtin that rested first its `token`."""
        self._reader.start()
        with contextlib.suppress(GuestGone):  # it refused already, which `status` says
            self.send(b"t", ahead, _message(b"a", token) if token else b"")

    def number(self) -> int:
        """Return a number for a request, which no other has."""
        return next(self._numbers) & 0xFFFFFFFF

    def send(self, kind: bytes, body: bytes, before: bytes = b"") -> None:
        """Send one message, after the bytes of `before`. Raises GuestGone."""
        message = before + _message(kind, body)
        with self._sending:
            if self.over:
                raise GuestGone("the machine's answerer has gone", machine=self.machine)
            try:
                self._process.stdin.write(message, _SEND_TIMEOUT)
            except (BrokenPipeError, WaitTimeout, ValueError) as error:
                raise GuestGone("the machine's answerer has gone", machine=self.machine) from error

    def ask(self, kind: bytes, body: bytes, number: int | None = None) -> bytes:
        """Send a request and wait for its reply. Raises OSError with its errno, GuestGone."""
        number = self.number() if number is None else number
        reply = self._replies[number] = _Reply()
        try:
            self.send(kind, struct.pack("<I", number) + body)
            if not reply.came.wait(REPLY_TIMEOUT):
                raise OSError(errno.ETIMEDOUT, "the machine's answerer does not answer")
        finally:
            self._replies.pop(number, None)
        if reply.errno:
            raise OSError(reply.errno, os.strerror(reply.errno))
        return reply.data

    def status(self) -> int | None:
        """Return the errno that it rests with or has ended with, None if it does neither."""
        if self._rests is None:
            with contextlib.suppress(GuestError):
                self._process.wait(0.5 if self.over else 0.0)
            return self._process.poll()
        return self._rests

    def close(self) -> None:
        """Leave the builtin to the next listener if it rests, and end it if not; wait for our thread."""
        over, self.over = self.over, True
        if self._rests is not None:
            self.join()
            self._spare()
            return
        if not over and not self._process.stdin.closed:
            with contextlib.suppress(GuestError, OSError):
                self._process.stdin.close()
        with contextlib.suppress(GuestError):
            self._process.close()
        self.join()

    def join(self) -> None:
        """Wait until nothing is taken any more."""
        if self._reader is not threading.current_thread():
            self._reader.join(REPLY_TIMEOUT)

    def _spare(self) -> None:
        with self._sending:  # nothing of ours is on its way any more
            spares, self._spares = self._spares, None
        if spares is not None and len(spares) < MAX_SPARES:
            spares.append(self._process)
        elif spares is not None:
            self._process.stdin.close()

    def _read_all(self) -> None:
        buffer = bytearray()
        try:
            while part := self._process.stdout.read(_READ):
                buffer += part
                at = 0
                while len(buffer) - at >= 4:
                    size = int.from_bytes(buffer[at : at + 4], "little")
                    if not 1 <= size <= MAX_MESSAGE:
                        raise GuestProtocolError(f"a message of {size} bytes from the answerer", machine=self.machine)
                    if len(buffer) - at - 4 < size:
                        break
                    self._came(buffer[at + 4], bytes(buffer[at + 5 : at + 4 + size]))
                    at += 4 + size
                del buffer[:at]
                if self._rests is not None:
                    if buffer:
                        self._rests = None
                        raise GuestProtocolError("a message from an answerer that rests", machine=self.machine)
                    break
        except (GuestError, ValueError, struct.error, OSError):
            pass  # it is over, whatever it was: all calls fail closed in the machine
        finally:
            self.over = True
            for reply in list(self._replies.values()):
                reply.came.set()
            self._ended()

    def _came(self, kind: int, body: bytes) -> None:
        if kind == ord("x") and self._rests is None:
            self._rests = abs(struct.unpack("<i", body)[0])
            return
        if kind == ord("R"):
            number, code = struct.unpack_from("<Ii", body)
            reply = self._replies.get(number)
            if reply is not None:
                reply.errno, reply.data = abs(code), body[8:]
                reply.came.set()
                return
        self._take(kind, body)


def _message(kind: bytes, body: bytes) -> bytes:
    return _HEAD.pack(len(body) + 1, kind[0]) + body
