"""The host's end of the line to one machine: many streams over one socket.

One daemon thread reads the socket and hands each frame to the handler of its stream, on that thread: a handler stores
and notifies, and never waits. Callers send from their own threads. The reader drains the line whatever callers do, so
one slow stream holds up no other (its window bounds what it may leave here).

A line has one failure, its first: GuestGone when the peer closed, GuestProtocolError when it sent what it may not; all
streams get it, and the socket is closed. A line belongs to the process that made it: after a fork the child's copy is
closed without a word to the peer, and every use of it raises GuestGone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

from trivisor.core.errors import GuestError, GuestGone, GuestProtocolError
from trivisor.vos import wire
from trivisor.vos.outbox import Buffer, Outbox
from trivisor.vos.wire import Type

_PATH_MAX = 107
_RECENT = 256
_GONE_HINT = "look at the machine's state and logs; start it again if it stopped"

_lines: weakref.WeakSet[Line] = weakref.WeakSet()
_watch_forks = threading.Event()


class Handler(Protocol):
    """What a stream does with its frames. Called on the reading thread: neither method may wait."""

    def frame(self, kind: int, payload: memoryview) -> bool:
        """Take one frame; True if it was the last of the stream. Raises GuestProtocolError."""
        ...

    def lost(self, error: GuestError) -> None:
        """The line failed; no frame will come any more."""
        ...


class Line:
    """A connected line. Thread-safe. `machine` is for messages."""

    def __init__(self, sock: socket.socket, machine: str) -> None:
        """Take over `sock`, a connected stream socket."""
        sock.setblocking(False)
        self.machine = machine
        self._sock = sock
        self._pid = os.getpid()
        self._outbox = Outbox(sock)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._streams: dict[int, Handler] = {}
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._numbers = itertools.cycle(range(1, wire.STREAMS + 1))
        self._failure: GuestError | None = None
        self._ended = threading.Event()
        _lines.add(self)
        if not _watch_forks.is_set():
            _watch_forks.set()
            os.register_at_fork(after_in_child=_forked)
        self._reader = threading.Thread(target=self._read, name=f"line of {machine}", daemon=True)
        self._reader.start()

    @classmethod
    def connect(cls, path: Path, machine: str, timeout: float = 5.0) -> Self:
        """Connect to a keeper's socket. Raises GuestGone if none listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            dial(sock, path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * wire.WINDOW)
        except OSError as error:
            sock.close()
            raise GuestGone(f"nothing answers for the machine: {error.strerror or error}", machine=machine, hint=_GONE_HINT) from error
        return cls(sock, machine)

    @property
    def closed(self) -> bool:
        """True if this process cannot use the line (any more)."""
        return self._failure is not None or self.foreign

    @property
    def foreign(self) -> bool:
        """True in a forked child: no lock of the line or its streams may be touched, a thread that is not here may hold it."""
        return self._pid != os.getpid()

    def close(self) -> None:
        """Close it; what is under way ends with GuestGone. The peer kills this client's commands."""
        if self.foreign:
            return
        self._fail(GuestGone("the line was closed", machine=self.machine, hint="open the machine again"))
        if threading.current_thread() is not self._reader:
            self._reader.join(5.0)

    def wait_closed(self, timeout: float) -> bool:
        """Wait until the line has closed, at most `timeout` seconds; say whether it has."""
        return self.closed or self._ended.wait(timeout)

    def check(self) -> None:
        """Raise the line's failure, if it has one."""
        if self._failure is not None:
            raise _copy(self._failure)
        if self.foreign:
            raise GuestGone("this line belongs to the parent process", machine=self.machine, hint="open the machine again after a fork")

    # -- streams ----------------------------------------------------------------------------------

    def open(self, handler: Handler) -> int:
        """Give `handler` a stream of its own and return the stream's number."""
        self.check()
        with self._lock:
            if self._failure is not None:
                raise _copy(self._failure)
            if len(self._streams) >= wire.STREAMS:
                raise GuestError("all streams of the line are in use", machine=self.machine, hint="end some commands")
            number = next(n for n in self._numbers if n not in self._streams)
            self._streams[number] = handler
            return number

    def send(self, buffers: Iterable[Buffer], deadline: float | None) -> None:
        """Send, waiting while the peer takes nothing, at most until `deadline` (monotonic); what is left is sent later."""
        self._put(buffers)
        if self._outbox.size:
            try:
                self._outbox.drain(deadline)
            except (OSError, ValueError) as error:
                self._broken(error)
            if self._outbox.size:
                self._nudge()

    def post(self, frame: bytes) -> None:
        """Send without waiting."""
        self._put((frame,))
        if self._outbox.size and threading.current_thread() is not self._reader:
            self._nudge()

    def request(self, kind: int, payload: bytes = b"", timeout: float = 10.0) -> bytes:
        """Send a request of one frame and return the payload of its answer.

        Raises GuestError with the guest's words if it answers with ERROR, or not within `timeout` seconds.
        """
        if len(payload) > wire.FRAME_MAX:
            raise GuestError(f"a request of {len(payload)} bytes is more than a frame holds", machine=self.machine)
        answer = _Answer()
        deadline = time.monotonic() + timeout
        number = self.open(answer)
        self.send((wire.frame(kind, number, payload),), deadline)
        got = answer.wait(deadline)
        if got is None:
            message = f"no answer to {Type(kind).name} within {timeout:g} s"
            raise GuestError(message, machine=self.machine, hint="the machine may be paused or hung")
        if isinstance(got, GuestError):
            raise _copy(got)
        answered, data = got
        if answered == Type.ERROR:
            code, message = wire.parse_error(memoryview(data))
            raise GuestError(f"{message or Type(kind).name}: {os.strerror(code)}", machine=self.machine)
        return data

    def keeper_info(self, timeout: float = 5.0) -> dict[str, str]:
        """Ask the keeper about itself: keeper, engine (pids), synced, clients, uptime_ms."""
        text = self.request(Type.KEEPER, timeout=timeout).decode("utf-8", "replace")
        return dict(line.partition("=")[::2] for line in text.splitlines())

    # -- sending and receiving --------------------------------------------------------------------

    def _put(self, buffers: Iterable[Buffer]) -> None:
        self.check()
        try:
            self._outbox.put(buffers)
        except (OSError, ValueError) as error:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        self._fail(GuestGone(f"the line broke: {error}", machine=self.machine, hint=_GONE_HINT))
        self.check()

    def _nudge(self) -> None:
        """Wake the reader, which sends what is queued as soon as the socket takes it."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _read(self) -> None:
        try:
            self._pump()
        except GuestError as error:
            error.machine = error.machine or self.machine
            self._fail(error)
        except (OSError, ValueError) as error:
            self._fail(GuestGone(f"the line broke: {error}", machine=self.machine, hint=_GONE_HINT))
        finally:
            with self._lock:
                wake, self._wake = self._wake, -1
            self._sock.close()
            os.close(wake)
            self._ended.set()

    def _pump(self) -> None:
        """Read frames for as long as the line lives."""
        sock, wake, parser = self._sock, self._wake, wire.Parser()
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        poller.register(sock, select.POLLIN)
        was_blocked = False
        while self._failure is None:
            blocked = self._outbox.size > 0 and not self._outbox.flush()
            if blocked != was_blocked:
                poller.modify(sock, select.POLLIN | select.POLLOUT if blocked else select.POLLIN)
                was_blocked = blocked
            for fd, _ in poller.poll():
                if fd == wake:
                    os.eventfd_read(wake)
            try:
                received = sock.recv_into(parser.space())
            except BlockingIOError:
                continue
            if received == 0:
                raise GuestGone("the line to the machine closed", hint=_GONE_HINT)
            for kind, stream, payload in parser.frames(received):
                self._dispatch(kind, stream, payload)

    def _dispatch(self, kind: int, stream: int, payload: memoryview) -> None:
        handler = self._streams.get(stream)
        if handler is None:
            # LOG and BYE are for the keeper; a stream that has just ended may have crossed frames on their way.
            if stream not in self._recent and kind not in (Type.LOG, Type.BYE):
                raise GuestProtocolError(f"a frame of type {kind:#04x} on stream {stream}, which nobody opened")
        elif handler.frame(kind, payload):
            with self._lock:
                self._streams.pop(stream, None)
                self._recent.append(stream)

    def _fail(self, error: GuestError) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            handlers = list(self._streams.values())
            self._streams.clear()
        with contextlib.suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the reader, which closes it
        for handler in handlers:
            handler.lost(error)

    def forget(self) -> None:
        """In a forked child: close our copies, so that the parent's end is seen when the parent ends."""
        self._sock.close()
        if self._wake >= 0:
            os.close(self._wake)


class _Answer:
    """A stream that gets one frame."""

    def __init__(self) -> None:
        self._got: queue.SimpleQueue[tuple[int, bytes] | GuestError] = queue.SimpleQueue()

    def frame(self, kind: int, payload: memoryview) -> bool:
        if kind not in (Type.OK, Type.ERROR, Type.PONG, Type.KEEPER_INFO):
            raise GuestProtocolError(f"a frame of type {kind:#04x} answers a request")
        if kind == Type.ERROR:
            wire.parse_error(payload)
        self._got.put((kind, bytes(payload)))
        return True

    def lost(self, error: GuestError) -> None:
        self._got.put(error)

    def wait(self, deadline: float) -> tuple[int, bytes] | GuestError | None:
        try:
            return self._got.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None


def _copy(error: GuestError) -> GuestError:
    """A fresh exception for each thread that gets it: tracebacks must not pile up on one."""
    return type(error)(error.message, machine=error.machine, hint=error.hint)


def _forked() -> None:
    for line in list(_lines):
        line.forget()


def dial(sock: socket.socket, path: Path) -> None:
    if len(os.fsencode(path)) <= _PATH_MAX:
        sock.connect(os.fspath(path))
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
