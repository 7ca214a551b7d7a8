"""A port of the host that leads to a port in the machine, over the line: it needs no network.

One thread accepts; each connection has a `connect` builtin in the guest and two threads, one a direction, so that a
slow side holds up nothing but itself. At most LIMIT connections at a time: what comes beyond waits in the backlog.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from trivisor.core.errors import HostError, InvalidSpec, TrivisorError
from trivisor.vos.process import Process
from trivisor.vos.processes import Processes

LIMIT = 128
_PIECE = 64 * 1024
_BACKLOG = 64
_REFUSAL = 2.0
"""Seconds that a refused connection's status may come after the end of its output: a busy guest says one, and later the other."""


class Forward:
    """A listening port. Ends at `close()`, or as a context manager; connections under way end with it."""

    def __init__(self, processes: Processes, guest_port: int, host_port: int, host: str, guest_host: str) -> None:
        self._processes = processes
        self._target = (guest_host, guest_port)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, host_port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise HostError(
                f"cannot listen on {host} port {host_port}: {error.strerror}", hint="take another host port, or 0 for a free one"
            ) from error
        self.host = host
        self.guest_port = guest_port
        self.port: int = self._listener.getsockname()[1]
        """The port on the host."""
        self._closing = threading.Event()
        self._stop, self._wake = socket.socketpair()
        self._free = threading.BoundedSemaphore(LIMIT)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, Process | None] = {}
        self._thread = threading.Thread(target=self._accept, name=f"forward {self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end all connections."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.close()
        with self._lock:
            under_way = list(self._open.items())
        for client, process in under_way:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            if process is not None:
                with contextlib.suppress(TrivisorError):
                    process.kill()
        self._thread.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        with self._listener, self._stop:
            while not self._closing.is_set():
                # Bounded, since a semaphore cannot be waited for together with a descriptor.
                if not self._free.acquire(timeout=1.0):
                    continue
                ready, _, _ = select.select([self._listener, self._stop], [], [])
                if self._stop in ready:
                    return
                try:
                    client, _ = self._listener.accept()
                except OSError:
                    self._free.release()  # it left before we came
                    continue
                threading.Thread(target=self._serve, args=(client,), name=f"forward {self.port}", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Carry one connection to its end."""
        with self._lock:
            self._open[client] = None
        try:
            with client:
                self._carry(client)
        except (OSError, TrivisorError):
            return  # a connection that fails is closed, which is all its peers can be told
        finally:
            with self._lock:
                del self._open[client]
            self._free.release()

    def _carry(self, client: socket.socket) -> None:
        host, port = self._target
        try:
            process = self._processes.builtin(["connect", host, str(port)], stdin=True)
        except TrivisorError:
            _reset(client)
            raise
        with process:
            with self._lock:
                self._open[client] = process
            if self._closing.is_set():
                return
            threading.Thread(target=_upstream, args=(client, process), name=f"forward {self.port} up", daemon=True).start()
            try:
                _downstream(client, process)
            finally:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RD)  # wakes the other direction, which would keep the socket open


def forward(processes: Processes, guest_port: int, host_port: int = 0, host: str = "127.0.0.1", guest_host: str = "127.0.0.1") -> Forward:
    """Listen on `host_port` (0: any free one) and lead each TCP connection to `guest_port` in the machine.

    Raises InvalidSpec for what is not a port, HostError if the host's port is taken.
    """
    for port, least in ((guest_port, 1), (host_port, 0)):
        if isinstance(port, bool) or not isinstance(port, int) or not least <= port <= 65535:
            raise InvalidSpec(f"port {port!r} is not {least} to 65535")
    return Forward(processes, guest_port, host_port, host, guest_host)


def _downstream(client: socket.socket, process: Process) -> None:
    """From the guest to the client, then wait for the end of both directions."""
    silent = True
    while part := process.stdout.read(_PIECE):
        client.sendall(part)
        silent = False
    # A connection that was refused ends at once with an error, which the client learns by a reset; an end of file
    # alone is one direction's end.
    with contextlib.suppress(TimeoutError):
        if silent and process.wait(_REFUSAL):
            _reset(client)
            return
    client.shutdown(socket.SHUT_WR)
    process.wait()


def _upstream(client: socket.socket, process: Process) -> None:
    """From the client to the guest. Ends with the client's end of file, or when either side has gone."""
    try:
        while part := client.recv(_PIECE):
            process.stdin.write(part)
        process.stdin.close()
    except (OSError, ValueError, TrivisorError):
        with contextlib.suppress(TrivisorError):
            process.kill()


def _reset(client: socket.socket) -> None:
    """Make the close that follows a reset."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
