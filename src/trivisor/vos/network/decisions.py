"""What an egress policy decides, as it happens: the kernel logs the first packet of what is allowed, and each that is refused; what
is decided by names, the machine's helper says (guest/src/egress.c).

The kernel does so only while somebody listens, and one process can (linux/netfilter/nfnetlink_log.h): decisions are made in the kernel,
whether they are read or not. A machine that is refused faster than we read makes the kernel drop what it would have told us, which is
counted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from trivisor.core.errors import Busy, HostLacks
from trivisor.launch.net import netlink
from trivisor.launch.net.netlink import Netlink, attribute, attributes

_SUBSYSTEM = 4 << 8
_PACKET, _CONFIG = _SUBSYSTEM, _SUBSYSTEM | 1
_COMMAND, _MODE = 1, 2
_BIND, _COPY_PACKET = 1, 2
_TIMESTAMP, _PAYLOAD, _PREFIX = 3, 9, 10
_COPIED = 64
_TCP, _UDP = 6, 17
_PROTOCOLS = {1: "icmp", _TCP: "tcp", _UDP: "udp"}
_HEADER = struct.Struct("=IHHII")
_BUFFER = 1 << 20
_LINE = 1024


@dataclass(frozen=True)
class Decision:
    """One packet that began something, or was to; or one question for a name."""

    time: float
    """Seconds since the epoch."""
    allowed: bool
    protocol: str
    """tcp, udp, icmp, the number of another, or ipv6: machines have none; or dns: a question for a name."""
    address: str
    """Where it was to go; of a question the first address of the answer, "" without any."""
    port: int
    """0 where there are none."""
    name: str = ""
    """Whom it asked for, where a policy of names decided."""
    reason: str = ""
    """Why it is refused, where a policy of names decided."""


class Decisions:
    """An iterator over a machine's decisions, from now until it is closed. A context manager."""

    def __init__(self, group: int, machine: str = "", ear: socket.socket | None = None) -> None:
        """`group`: of the kernel's log. `ear`: where the helper says what it decides, taken over."""
        self._missed = self._unheard = 0
        self._ear = ear
        self._stop, self._wake = socket.socketpair()
        self._kernel = Netlink(netlink.NETFILTER)
        self._ready: list[Decision] = []
        self._closed = False
        header = struct.pack(">BBH", socket.AF_UNSPEC, 0, group)
        try:
            self._kernel.ask([(_CONFIG, 0, header + attribute(_COMMAND, struct.pack("=B", _BIND)))])
            self._kernel.ask([(_CONFIG, 0, header + attribute(_MODE, struct.pack(">IBx", _COPIED, _COPY_PACKET)))])
        except OSError as error:
            self.close()
            if error.errno in (errno.EBUSY, errno.EPERM) and os.geteuid() == 0:
                raise Busy(machine, "another process reads its decisions") from error
            raise HostLacks(f"decisions cannot be read: {error.strerror}", machine=machine, hint="modprobe nfnetlink_log") from error

    @property
    def dropped(self) -> int:
        """How many times the kernel had more to say than we had read, and decisions of the helper that we were late for."""
        return self._missed + self._unheard

    def read(self, timeout: float | None = None) -> Decision | None:
        """Return the next decision; None after `timeout` seconds, or when it is closed. What waits already is returned in no time, too."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ready:
            if self._closed:
                return None
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ear: list[Netlink | socket.socket] = [self._ear] if self._ear is not None else []
            ready, _, _ = select.select([self._kernel, self._stop, *ear], [], [], left)
            if self._stop in ready:
                return None
            if self._kernel in ready:
                self._receive()
            if self._ear in ready:
                self._hear()
            if left == 0 and not self._ready:
                return None
        return self._ready.pop(0)

    def __iter__(self) -> Iterator[Decision]:
        while (decision := self.read()) is not None:
            yield decision

    def close(self) -> None:
        """Listen no longer; a read under way in another thread returns."""
        if not self._closed:
            self._closed = True
            self._wake.close()
            self._kernel.close()
            if self._ear is not None:
                self._ear.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _receive(self) -> None:
        try:
            data = self._kernel.receive(_BUFFER)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._missed += 1
            return
        while len(data) >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            if kind == _PACKET:
                with contextlib.suppress(ValueError):  # a packet too short to say where it was to go
                    self._ready.append(decision(attributes(data[_HEADER.size + 4 : length])))
            data = data[(length + 3) & ~3 :]

    def _hear(self) -> None:
        assert self._ear is not None
        line = self._ear.recv(_LINE)
        if not line:  # the machine has ended
            self._ear.close()
            self._ear = None
            return
        with contextlib.suppress(ValueError):
            made, self._unheard = named(line.decode("ascii", "replace"), self._unheard)
            self._ready.append(made)


def named(line: str, before: int = 0) -> tuple[Decision, int]:
    """Return what the helper says (egress.c), and how many decisions nobody heard since `before`. Raises ValueError."""
    at, verdict, protocol, address, port, name, reason, unheard = line.split("\t")
    return Decision(float(at), verdict == "allowed", protocol, address, int(port), name, reason), max(before, int(unheard))


def decision(said: dict[int, bytes]) -> Decision:
    """Return what a packet of the log says. Raises ValueError for one that is too short, or none."""
    packet = said.get(_PAYLOAD, b"")
    size = (packet[0] & 15) * 4 if packet else 0
    stamp = said.get(_TIMESTAMP)
    seconds, micros = struct.unpack(">QQ", stamp) if stamp else (0, 0)
    at = seconds + micros / 1e6 if stamp else time.time()
    allowed = said.get(_PREFIX, b"").rstrip(b"\0") == b"allowed"
    version = packet[0] >> 4 if packet else 0
    if version == 6 and len(packet) >= 40:
        return Decision(at, allowed, "ipv6", socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0)
    if version != 4 or not 20 <= size <= len(packet):
        raise ValueError(f"a packet of version {version}")
    protocol = packet[9]
    if protocol in (_TCP, _UDP) and len(packet) < size + 4:
        raise ValueError("a packet without ports")
    (port,) = struct.unpack_from(">H", packet, size + 2) if protocol in (_TCP, _UDP) else (0,)
    return Decision(at, allowed, _PROTOCOLS.get(protocol, str(protocol)), socket.inet_ntoa(packet[16:20]), port)
