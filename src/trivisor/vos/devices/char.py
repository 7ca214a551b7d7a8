"""A serial line whose other end is Python: subclass CharDevice and attach an object of it.

In a VM it is a port of virtio-serial (/dev/vportNpM, found by its name under /sys/class/virtio-ports): a stream of bytes both ways, which
one program at a time may open. When `receive` raises, or this process ends, the line is hung up.
"""

from __future__ import annotations

import socket
import threading
from collections import deque

from trivisor.core.devices import Served
from trivisor.core.errors import GuestGone, InvalidState, WaitTimeout

KEPT = 16
_READ = 65536


class CharDevice:
    """A stream of bytes. A subclass gives `receive`; `send` may be called from any thread."""

    def __init__(self) -> None:
        self.faults: deque[BaseException] = deque(maxlen=KEPT)
        """What `receive` raised."""
        self._line: CharLine | None = None

    def receive(self, data: bytes) -> bytes | None:
        """Take what the guest wrote; what is returned is sent back. While it runs, the guest's writing waits."""
        return None

    def send(self, data: bytes, timeout: float = 5.0) -> None:
        """Send to the guest. Raises InvalidState if it is attached nowhere, WaitTimeout if the guest reads too little, GuestGone."""
        line = self._line
        if line is None:
            raise InvalidState("", "not attached", "send to the guest", ["attached"])
        line.send(data, timeout)

    def served(self) -> Served:
        """Return what the machine is told about it."""
        return Served("char")

    def serve(self, sock: socket.socket, name: str = "") -> CharLine:
        """Answer on `sock`, which is the line's from now on."""
        self._line = CharLine(sock, self)
        self._line.start()
        return self._line


class CharLine:
    """The host's end of one attached CharDevice."""

    def __init__(self, sock: socket.socket, device: CharDevice) -> None:
        self._socket = sock
        self._device = device
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether the other end is still there."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Hang up. A function that runs is not waited for."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end was first

    def send(self, data: bytes, timeout: float) -> None:
        try:
            with self._sending:
                # Of the socket's, only sending has a timeout: the reader waits for as long as the line lives.
                view = memoryview(data)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
                while view:
                    view = view[self._socket.send(view) :]
        except BlockingIOError:
            raise WaitTimeout(f"the guest has not read what was sent for {timeout:g} s") from None
        except OSError as error:
            raise GuestGone("the device is no longer attached") from error

    def _run(self) -> None:
        try:
            while data := self._socket.recv(_READ):
                answer = self._device.receive(data)
                if answer:
                    self.send(answer, 60.0)
        except Exception as error:
            self._device.faults.append(error)
        finally:
            self._socket.close()


def _timeval(seconds: float) -> bytes:
    micros = max(1, int(seconds * 1e6))
    return (micros // 1_000_000).to_bytes(8, "little") + (micros % 1_000_000).to_bytes(8, "little")
