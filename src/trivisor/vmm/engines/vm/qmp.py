"""A small synchronous QMP client (docs/interop/qmp-spec): connect, ask, pass descriptors.

Synchronous, because the library is: an asyncio client cannot be driven from a caller that is itself inside a
running event loop. Every wait has a deadline. QEMU runs in the jail and may be in a guest's hands, so a reply is
bounded too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trivisor.core.errors import EngineError

MAX_REPLY = 4 << 20
TIMEOUT = 10.0
MAX_EVENTS = 1000


class StateRefused(EngineError):
    """QEMU did not take a frozen state: it said so, or it ended."""


class Unanswered(EngineError):
    """QEMU did not say in time what was waited for."""


class Qmp:
    """One connection to one machine's QEMU. Not thread-safe; a context manager."""

    def __init__(self, sock: socket.socket, machine: str = "") -> None:
        self._socket = sock
        self._machine = machine
        self._buffer = bytearray()
        # No number that the client before used, too.
        self._asked = int.from_bytes(os.urandom(4))
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    @classmethod
    def connect(cls, path: Path, machine: str = "", timeout: float = TIMEOUT) -> Self:
        """Connect to the socket at `path` and leave negotiation mode. Raises EngineError."""
        sock = _dial(path, machine, timeout)
        qmp = cls(sock, machine)
        try:
            deadline = time.monotonic() + timeout
            # What the client before did not wait for may come first.
            while "QMP" not in (said := qmp._message(deadline)):
                if not said.keys() & {"return", "error", "event"}:
                    raise EngineError("QEMU answered with something that is not QMP", machine=machine)
            qmp.ask("qmp_capabilities", timeout=timeout)
        except BaseException:
            qmp.close()
            raise
        return qmp

    def ask(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = TIMEOUT, fd: int | None = None) -> Any:
        """Carry out one command and return what it returns; `fd` travels with it. Raises EngineError."""
        self._asked += 1
        request = json.dumps({"execute": command, "arguments": arguments or {}, "id": self._asked}).encode() + b"\n"
        deadline = time.monotonic() + timeout
        try:
            self._socket.settimeout(timeout)
            if fd is None:
                self._socket.sendall(request)
            else:
                sent = socket.send_fds(self._socket, [request], [fd])
                self._socket.sendall(request[sent:])
        except OSError as error:
            raise self._gone(command, error) from error
        while True:
            message = self._message(deadline, command)
            if "event" not in message and message.get("id") != self._asked:
                continue  # it is for the client before
            if "error" in message:
                detail = message["error"]
                text = str(detail.get("desc", detail)) if isinstance(detail, dict) else str(detail)
                raise EngineError(f"QEMU refused {command}", output=text[:1000], machine=self._machine)
            if "return" in message:
                return message["return"]
            if "event" in message:
                self._events.append(message)

    def wait_event(self, name: str, matches: Callable[[dict[str, Any]], bool], timeout: float) -> bool:
        """Wait for an event of that name whose data `matches`, which may have come since the last wait. Raises EngineError if QEMU ends."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self._events.popleft() if self._events else self._message(deadline, name)
            except Unanswered:
                return False
            if message.get("event") == name and matches(message.get("data") or {}):
                return True

    def state_to(self, fd: int, *, timeout: float = 60.0) -> None:
        """Save the stopped machine's device state, without RAM, to `fd`, open for writing only."""
        added = self.ask("add-fd", {"fdset-id": 7}, fd=fd)
        try:
            self.ask("xen-save-devices-state", {"filename": "/dev/fdset/7", "live": False}, timeout=timeout)
        finally:
            self.ask("remove-fd", {"fdset-id": 7, "fd": int(added["fd"])})

    def state_from(self, fd: int, *, timeout: float = 30.0) -> None:
        """Load device state from `fd` into a QEMU that waits for it. The machine is stopped after. Raises StateRefused."""
        try:
            self.ask("getfd", {"fdname": "state"}, fd=fd)
            self.ask("migrate-incoming", {"uri": "fd:state"})
            deadline = time.monotonic() + timeout
            # QEMU has an event for this, but only with a capability that must be set first: asking is as quick.
            while (status := self.ask("query-status")["status"]) in ("inmigrate", "finish-migrate"):
                if time.monotonic() > deadline:
                    raise StateRefused(f"QEMU took over {timeout:g} s to take its state", machine=self._machine)
                time.sleep(0.0005)
        except EngineError as error:
            raise StateRefused("QEMU did not take the frozen state", output=str(error), machine=self._machine) from error
        if status not in ("paused", "prelaunch", "running", "postmigrate"):
            raise StateRefused(f"QEMU did not take the frozen state: it is {status}", machine=self._machine)

    def close(self) -> None:
        self._socket.close()

    def quit(self) -> None:
        """Ask QEMU to end; it may be gone before it answers."""
        with contextlib.suppress(EngineError):
            self.ask("quit", timeout=2.0)

    def wait_closed(self, timeout: float = TIMEOUT) -> None:
        """Wait until QEMU has gone. Raises EngineError if it stays."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._socket.settimeout(left)
                if not self._socket.recv(65536):
                    return
            except ConnectionError:
                return
            except TimeoutError:
                continue
        raise EngineError(f"QEMU has not ended after {timeout:g} s", machine=self._machine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def letter(self, path: Path, commands: Sequence[str]) -> Iterator[None]:
        """Have QEMU, which listens at `path` too, carry out `commands` when this connection has ended, however that comes about.

        They wait in a second connection, which it takes when the first is over. It is given the sender's end of that itself: what came
        by a connection whose sender has ended it might not read.
        """
        said = ["qmp_capabilities", *commands]
        with _dial(path, self._machine, TIMEOUT) as sock:
            end = {"execute": "closefd", "arguments": {"fdname": "letter"}}
            sock.sendall(b"".join(json.dumps(message).encode() for message in (*({"execute": command} for command in said), end)))
            self.ask("getfd", {"fdname": "letter"}, fd=sock.fileno())
        yield

    def _message(self, deadline: float, command: str = "connect") -> dict[str, Any]:
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                try:
                    message = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise EngineError("QEMU answered with something that is not JSON", machine=self._machine) from error
                if isinstance(message, dict):
                    return message
                continue
            if len(self._buffer) > MAX_REPLY:
                raise EngineError("QEMU's answer has no end", machine=self._machine)
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unanswered(f"QEMU did not answer {command} in time", machine=self._machine)
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._gone(command, error) from error
            if not data:
                raise self._gone(command, None)
            self._buffer += data

    def _gone(self, command: str, error: OSError | None) -> EngineError:
        return EngineError(f"QEMU ended during {command}", output=str(error or ""), machine=self._machine)


def _dial(path: Path, machine: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # QEMU talks to one client at a time, and few may wait for it. One more is to wait, too; settimeout would make the socket
        # one that does not block, and such a one is refused at once then (connect(2), EAGAIN).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6)))
        # A path may be longer than a socket address: go by the folder's descriptor.
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        sock.settimeout(timeout)
    except OSError as error:
        sock.close()
        raise EngineError("QEMU does not answer", output=str(error), machine=machine) from error
    return sock
