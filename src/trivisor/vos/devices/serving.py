"""Functions of this process that answer a device's requests, one after the other, and may raise, hang or answer garbage.

A thread reads the connection and never calls a function; another calls them. A function that takes longer than it may is given up:
its request is failed by the reader, and a fresh thread goes on with the next one. What it answers later is dropped. Threads that hang
cannot be ended, so there are at most STUCK of them: past that, requests fail at once until one comes back.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

STUCK = 8
QUEUED = 64
"""Requests that wait; a guest that sends more is read no further until some are answered."""
_READ = 1 << 20
_SEND = 5.0


class ProtocolError(Exception):
    """The other end sent what the protocol does not allow."""


class Request(Protocol):
    """What a session reads, and functions answer."""

    @property
    def what(self) -> str: ...

    @property
    def unasked(self) -> bytes | None:
        """What it is answered with without asking a function, or None."""
        ...

    def failed(self, error: BaseException) -> bytes:
        """Return the answer if a function raised `error`, or took too long."""
        ...


R = TypeVar("R", bound=Request)
R_co = TypeVar("R_co", bound=Request, covariant=True)


class Session(Protocol[R_co]):
    """One connection's protocol, without its socket."""

    @property
    def done(self) -> bool:
        """Whether the other end has taken its leave."""
        ...

    def output(self) -> bytes:
        """Return what is to be sent now, of the session's own."""
        ...

    def feed(self, data: bytes) -> Iterator[R_co]:
        """Take bytes, give requests. Raises ProtocolError."""
        ...


class Server(Generic[R]):
    """Serves one connection by `answer` until either end closes. `failed` is told what a function raised; `late` says what
    one is answered with that took too long."""

    def __init__(
        self,
        sock: socket.socket,
        session: Session[R],
        answer: Callable[[R], bytes],
        timeout: float,
        failed: Callable[[BaseException], None],
        late: Callable[[R, BaseException], bytes] | None = None,
    ) -> None:
        self._socket = sock
        self._session = session
        self._answer = answer
        self._timeout = timeout
        self._failed = failed
        self._late = late or (lambda request, error: request.failed(error))
        self._queue: queue.SimpleQueue[R | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._calls: dict[object, tuple[R, float]] = {}
        """The call of the worker of the moment, and its deadline."""
        self._waiting = 0
        self._stuck = 0
        self._closed = False
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._worker: object = None
        self._reader = threading.Thread(target=self._read, name="device", daemon=True)

    def start(self) -> None:
        self._hire()
        self._reader.start()

    def close(self) -> None:
        """Hang up: the guest gets I/O errors from then on. A function that runs is not waited for."""
        with self._lock:
            self._closed = True
        self._poke()
        if threading.current_thread() is not self._reader:
            self._reader.join(_SEND + 1)

    @property
    def open(self) -> bool:
        """Whether the other end is still there."""
        return self._reader.is_alive()

    # -- reading ----------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            self._send(self._session.output())
            while not self._closed and self._turn():
                pass
        except (OSError, ProtocolError) as error:
            if not self._closed and not isinstance(error, ConnectionError):
                self._failed(error)
        finally:
            self._closed = True
            self._queue.put(None)
            self._socket.close()
            with self._lock:
                self._wake.close()
                self._waker.close()

    def _turn(self) -> bool:
        """Wait for bytes, a deadline or a worker. False once the client has gone."""
        with self._lock:
            deadline = min((at for _, at in self._calls.values()), default=None)
            full = self._waiting >= QUEUED
            # What waits will be begun by the worker, which tells nobody: a wake-up a request is dearer than a look now and then.
            left = self._timeout / 4 if self._waiting else None
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([self._wake, *([] if full else [self._socket])], [], [], left)
        self._give_up()
        if self._wake in readable:
            self._wake.recv(4096)
        if self._socket in readable:
            data = self._socket.recv(_READ)
            if not data:
                return False
            for request in self._session.feed(data):
                self._take(request)
            self._send(self._session.output())
        return not self._session.done

    def _take(self, request: R) -> None:
        unasked = request.unasked
        with self._lock:
            if unasked is None and self._worker is None:
                unasked = request.failed(TimeoutError())
            self._waiting += unasked is None
        if unasked is None:
            self._queue.put(request)
        else:
            self._send(unasked)

    def _give_up(self) -> None:
        """Fail the request whose function has taken too long, and have another thread go on."""
        now = time.monotonic()
        with self._lock:
            late = [(who, request) for who, (request, at) in self._calls.items() if at <= now]
            for who, _ in late:
                del self._calls[who]
                self._stuck += 1
                self._waiting -= 1
                self._worker = None
            hire = bool(late) and self._stuck <= STUCK
        for _, request in late:
            error = TimeoutError(f"{request.what} took over {self._timeout:g} s")
            self._failed(error)
            self._send(self._late(request, error))
        if hire:
            self._hire()
        elif late:
            self._fail_queued()

    def _fail_queued(self) -> None:
        while not self._queue.empty():
            request = self._queue.get()
            if request is not None:
                with self._lock:
                    self._waiting -= 1
                self._send(request.failed(TimeoutError()))

    def push(self, data: bytes) -> None:
        """Send what nobody has asked for. Raises OSError if the other end has gone."""
        self._send(data)

    def _send(self, data: bytes) -> None:
        """Send to a client that reads; one that does not is hung up on after some seconds."""
        if not data:
            return
        with self._sending:
            self._socket.settimeout(_SEND)
            self._socket.sendall(data)

    # -- calling ----------------------------------------------------------------------------------

    def _hire(self) -> None:
        who = object()
        self._worker = who
        threading.Thread(target=self._work, args=(who,), name="device function", daemon=True).start()

    def _work(self, who: object) -> None:
        while self._worker is who and (request := self._queue.get()) is not None:
            with self._lock:
                self._calls[who] = (request, time.monotonic() + self._timeout)
            answer = self._call(request)
            with self._lock:
                ours = self._calls.pop(who, None) is not None
                full = self._waiting >= QUEUED
                self._waiting -= ours
                self._stuck -= not ours
                alone = not ours and self._worker is None and not self._closed
            if not ours:
                if alone:
                    self._hire()
                return
            try:
                self._send(answer)
            except OSError:
                # It has hung up, or takes nothing: the reader ends this.
                self._closed = full = True
            if full:
                self._poke()

    def _call(self, request: R) -> bytes:
        try:
            return self._answer(request)
        except Exception as error:
            self._failed(error)
            return request.failed(error)

    def _poke(self) -> None:
        with self._lock:
            if self._waker.fileno() >= 0:
                try:
                    self._waker.send(b"x")
                except BlockingIOError:
                    return  # it has been woken already
