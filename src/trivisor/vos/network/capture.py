"""What passes a machine's link, written to a pcap file as it comes: a packet socket at the host's end, and one thread.

The kernel buffers what we are late for, and counts what it had to drop (packet(7), PACKET_STATISTICS): a capture never slows the
machine down. It sees what a machine sends before any rule does, and what comes to it after all rules and queues.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from trivisor.core.errors import HostLacks, InvalidSpec, StorageError
from trivisor.core.units import MIB
from trivisor.vos.network import pcap

SNAPLEN = 262_144
"""More than any packet has, those put together by the kernel included."""
_ALL = 3
_SO_TIMESTAMPNS = 35
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_AUXDATA = 263, 6, 8
_TIMESPEC = struct.Struct("=qq")
_LENGTH = struct.Struct("=I")
"""Of the whole packet: tpacket_auxdata, after its status."""
_OTHERS = 128
_BUFFER = 16 * MIB
_CLOSE = 10.0


class Capture:
    """A capture under way. Ends at `close()`, as a context manager, when the machine ends, or with this process."""

    def __init__(self, interface: str, path: Path, *, snaplen: int = SNAPLEN, most: int | None = None, machine: str = "") -> None:
        """Begin. `most` bounds the file's bytes: what comes when it is full is counted as dropped."""
        if not 64 <= snaplen <= SNAPLEN:
            raise InvalidSpec(f"snaplen must be 64 to {SNAPLEN}, not {snaplen!r}")
        self.path = path
        self.packets = 0
        """How many have been written."""
        self._snaplen = snaplen
        self._most = most
        self._lost = 0
        self._failed: OSError | None = None
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except OSError as error:
            raise HostLacks(f"packets cannot be captured: {error.strerror}", machine=machine, hint="run as root") from error
        try:
            self._file = open(path, "wb")  # noqa: SIM115 - closed by the thread
        except OSError as error:
            self._socket.close()
            raise StorageError(f"{path} cannot be written: {error.strerror}", machine=machine) from error
        self._stop, self._wake = socket.socketpair()
        self._size = self._file.write(pcap.header(snaplen))
        self._file.flush()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            self._socket.bind((interface, _ALL))
        except OSError as error:
            self._release()
            raise HostLacks(f"{interface} cannot be listened to: {error.strerror}", machine=machine) from error
        self._thread = threading.Thread(target=self._run, name=f"capture {interface}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Packets that are not in the file, since it was full or we were late."""
        if self._socket.fileno() >= 0:
            said = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            self._lost += struct.unpack("=II", said)[1]  # the kernel begins anew with each answer
        return self._lost

    def wait(self, timeout: float | None = None) -> bool:
        """Return True when it has ended by itself, as it does with the machine; False after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End it; when this returns all that passed until now is in the file. Raises StorageError if not everything could be written."""
        self._wake.close()
        self._thread.join(_CLOSE)
        if self._failed is not None:
            raise StorageError(f"{self.path} could not be written to its end: {self._failed.strerror}", hint="free space")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._stop, select.POLLIN | select.POLLHUP)
        try:
            while True:
                ready = {fd for fd, _ in poller.poll()}
                if not self._drain() or self._stop.fileno() in ready:
                    return
        finally:
            lost = self.dropped
            self._release()
            self._lost = lost

    def _drain(self) -> bool:
        """Write what has come. Return whether there may be more."""
        try:
            while True:
                data, others, _, _ = self._socket.recvmsg(self._snaplen, _OTHERS, socket.MSG_DONTWAIT)
                self._write(data, others)
        except BlockingIOError:
            pass
        except OSError:  # the interface is gone: the machine has ended
            return False
        try:
            self._file.flush()
        except OSError as error:
            self._failed = error
        return self._failed is None

    def _write(self, data: bytes, others: list[tuple[int, int, bytes]]) -> None:
        said = {(level, kind): value for level, kind, value in others}
        seconds, nanoseconds = _TIMESPEC.unpack(said[socket.SOL_SOCKET, _SO_TIMESTAMPNS])
        (length,) = _LENGTH.unpack_from(said[_SOL_PACKET, _PACKET_AUXDATA], 4)
        made = pcap.record(seconds * 1_000_000_000 + nanoseconds, data, length)
        if self._most is not None and self._size + len(made) > self._most:
            self._lost += 1
            return
        try:
            self._file.write(made)
        except OSError as error:
            self._failed = error
            return
        self._size += len(made)
        self.packets += 1

    def _release(self) -> None:
        for one in (self._socket, self._stop, self._wake):
            one.close()
        try:
            self._file.close()
        except OSError as error:
            self._failed = self._failed or error
