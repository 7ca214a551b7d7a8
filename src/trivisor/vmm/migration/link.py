"""One connection between source and target: messages, and the bytes of channels, pumped by a thread.

A frame is u8 kind, u32 length (little-endian), payload: kind 0 a sign of life, 1 a message, from 2 on the bytes of a channel, none for its
end. A channel's bytes come from and go to a socket of ours: a QEMU's, or one that an image is written to. The thread owns them all and
the connection; it reads on only where what it read before has gone on, so memory stays bounded whoever is slow.

The other end is not trusted: lengths are bounded, a channel that nobody opened is an error, and who is silent for long is gone.
"""

from __future__ import annotations

import queue
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from trivisor.core.errors import MigrationError
from trivisor.vmm.migration.messages import MAX_DATA, MAX_MESSAGE, Failed, Message, decode, encode
from trivisor.vmm.migration.sealing import Sealing

if TYPE_CHECKING:
    from collections.abc import Callable

M = TypeVar("M", bound=Message)

MEMORY, DISK, IMAGE = 2, 3, 4
SILENCE = 30.0
"""Seconds after which a side that says nothing is gone."""
_LIFE = 5.0
_HEAD = struct.Struct("<BI")
_SIGN, _MESSAGE = 0, 1
_HIGH = 1 << 20
"""Bytes that may wait to be written before no more are read."""
_MESSAGES = 16
_FLUSH = 10.0
_SLICE = 0.1


class Refused(MigrationError):
    """The other side said that it is over: nothing of the machine runs there."""


class _Channel:
    """The bytes of one channel on their way to its socket, and whether either side has ended."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.waiting = bytearray()
        self.read_end = self.write_end = self.shut = False
        self.sent = self.received = 0


class Link:
    """One connection. Its methods may be called by any thread; `close` ends it. Raises MigrationError for all that goes wrong with it."""

    def __init__(self, sock: socket.socket, sealing: Sealing, began: bytes = b"") -> None:
        """`began`: what came with the last of the handshake."""
        self._socket = sock
        self._sealing = sealing
        self._lock = threading.Lock()
        self._out = bytearray()
        self._in = bytearray(began)
        self._channels: dict[int, _Channel] = {}
        self._inbox: queue.Queue[Message] = queue.Queue(_MESSAGES)
        self._failure: MigrationError | None = None
        self._closing = False
        self._wake, self._woken = socket.socketpair()
        for end in (sock, self._wake, self._woken):
            end.setblocking(False)
        self._heard = self._said = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="migration", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Put a message on its way."""
        self.check()
        data = encode(message)
        if len(data) > MAX_MESSAGE:
            raise MigrationError("what there is to say of the machine is too long", hint="has it very many labels or rules?")
        with self._lock:
            self._frame(_MESSAGE, data)
        self._ring()

    def receive(self, kind: type[M], timeout: float, look: Callable[[], None] = lambda: None) -> M:
        """Return the next message, which must be of that kind; `look` is called meanwhile and may raise. The other's Failed is raised."""
        deadline = time.monotonic() + timeout
        while True:
            look()
            try:
                message = self._inbox.get(timeout=_SLICE)
            except queue.Empty:
                self.check()
                if time.monotonic() > deadline:
                    raise MigrationError(f"the other side did not answer in {timeout:g} s", hint="is its host overloaded?") from None
                continue
            if isinstance(message, kind):
                return message
            raise refused(message)

    def look(self) -> None:
        """Raise what the other side said meanwhile, if it said anything, and what is wrong with the connection."""
        with suppress(queue.Empty):
            raise refused(self._inbox.get_nowait())
        self.check()

    def check(self) -> None:
        if self._failure is not None and self._inbox.empty():
            # Anew: one error may be raised by several threads.
            raise MigrationError(self._failure.message, hint=self._failure.hint)

    def open(self, channel: int, sock: socket.socket) -> None:
        """Have the bytes of a channel go to and come from `sock`, which is the link's from now on."""
        sock.setblocking(False)
        with self._lock:
            self._channels[channel] = _Channel(sock)
        self._ring()

    def ended(self, channel: int) -> bool:
        """Whether the other side has sent the last of a channel, and it has gone on."""
        return self._channels[channel].shut

    def sent(self, channel: int) -> int:
        """Return the bytes of a channel that were sent."""
        return self._channels[channel].sent if channel in self._channels else 0

    def received(self, channel: int) -> int:
        """Return the bytes of a channel that came."""
        return self._channels[channel].received if channel in self._channels else 0

    def close(self) -> None:
        """Send what there is to send, if that can be done soon, and end it."""
        self._closing = True
        self._ring()
        self._thread.join(_FLUSH + 1)
        for end in (self._wake, self._woken):
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._pump()
        except MigrationError as error:
            self._failure = error
        except OSError as error:
            self._failure = MigrationError(f"the connection broke: {error.strerror or error}", hint="see what ended the other side")
        finally:
            self._socket.close()
            for channel in self._channels.values():
                channel.socket.close()

    def _pump(self) -> None:
        until = 0.0
        self._parse(self._sealing.opened(b""))
        while True:
            now = time.monotonic()
            if self._closing:
                until = until or now + _FLUSH
                if not self._out or now > until:
                    with suppress(OSError):
                        self._socket.shutdown(socket.SHUT_WR)
                    return
            self._mind_silence(now)
            ready = self._wait()
            with self._lock:
                channels = list(self._channels.items())
            for number, channel in channels:
                events = ready.get(channel.socket.fileno(), 0)
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and not channel.read_end:
                    self._collect(number, channel)
                if channel.waiting and events & (select.POLLOUT | select.POLLHUP | select.POLLERR):
                    self._deliver(channel)
                self._end(channel)
            events = ready.get(self._socket.fileno(), 0)
            if events & select.POLLOUT:
                self._write()
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._read()

    def _wait(self) -> dict[int, int]:
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        with self._lock:
            full = len(self._out) >= _HIGH
            stuck = self._stuck()
            for channel in self._channels.values():
                wanted = (0 if channel.read_end or full else select.POLLIN) | (select.POLLOUT if channel.waiting else 0)
                if wanted:
                    poller.register(channel.socket, wanted)
            wanted = (select.POLLOUT if self._out else 0) | (0 if stuck or self._closing else select.POLLIN)
            if wanted:
                poller.register(self._socket, wanted)
        ready = dict(poller.poll(1000 * _SLICE if stuck or self._closing else 1000))
        if self._woken.fileno() in ready:
            with suppress(BlockingIOError):
                self._woken.recv(4096)
        return ready

    def _mind_silence(self, now: float) -> None:
        if self._stuck():
            self._heard = now  # it is not listened to
        if now - self._heard > SILENCE:
            raise MigrationError(f"the other side has been silent for {SILENCE:g} s", hint="is its process stopped, or the network cut?")
        if now - self._said > _LIFE:
            with self._lock:
                self._frame(_SIGN, b"")

    def _stuck(self) -> bool:
        """Whether what came has yet to go on."""
        return any(len(channel.waiting) >= _HIGH for channel in [*self._channels.values()]) or self._inbox.full()

    def _collect(self, number: int, channel: _Channel) -> None:
        """Take what a channel's socket has, and send it."""
        try:
            data = channel.socket.recv(MAX_DATA)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a QEMU that ended: the other side hears of it, ours by QMP
        channel.read_end = not data
        channel.sent += len(data)
        with self._lock:
            self._frame(number, data)

    def _deliver(self, channel: _Channel) -> None:
        try:
            sent = channel.socket.send(channel.waiting)
        except BlockingIOError:
            return
        except OSError:
            sent, channel.read_end = len(channel.waiting), True
        del channel.waiting[:sent]

    def _end(self, channel: _Channel) -> None:
        if channel.write_end and not channel.waiting and not channel.shut:
            channel.shut = True
            with suppress(OSError):
                channel.socket.shutdown(socket.SHUT_WR)

    def _write(self) -> None:
        with self._lock:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                return
            del self._out[:sent]

    def _read(self) -> None:
        try:
            data = self._socket.recv(MAX_DATA)
        except BlockingIOError:
            return
        if not data:
            raise MigrationError("the other side closed the connection", hint="see what it says, or what ended it")
        self._heard = time.monotonic()
        with self._lock:
            meant = self._sealing.opened(data)
        self._parse(meant)

    def _parse(self, data: bytes) -> None:
        self._in += data
        at = 0
        while len(self._in) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._in, at)
            if length > (MAX_MESSAGE if kind == _MESSAGE else MAX_DATA):
                raise MigrationError(f"the other side sent a frame of {length} bytes", hint="is it the same version?")
            if len(self._in) - at - _HEAD.size < length:
                break
            self._take(kind, bytes(self._in[at + _HEAD.size : at + _HEAD.size + length]))
            at += _HEAD.size + length
        del self._in[:at]

    def _take(self, kind: int, payload: bytes) -> None:
        if kind == _SIGN:
            return
        if kind == _MESSAGE:
            try:
                self._inbox.put_nowait(decode(payload))
            except queue.Full:
                raise MigrationError("the other side says more than it is asked", hint="is it the same version?") from None
            return
        channel = self._channels.get(kind)
        if channel is None or channel.write_end:
            raise MigrationError(f"the other side sent bytes of channel {kind}, which is not open", hint="is it the same version?")
        channel.received += len(payload)
        channel.waiting += payload
        channel.write_end = not payload
        self._end(channel)

    def _frame(self, kind: int, payload: bytes) -> None:
        self._out += self._sealing.sealed(_HEAD.pack(kind, len(payload)) + payload)
        self._said = time.monotonic()

    def _ring(self) -> None:
        with suppress(OSError):
            self._wake.send(b"!")


def refused(message: Message) -> MigrationError:
    """Return the error for a message that is not the one that was waited for."""
    if isinstance(message, Failed):
        return Refused(f"the other side says: {message.why}", hint=message.hint)
    return MigrationError(f"the other side says {type(message).__name__} where that means nothing", hint="is it the same version?")
