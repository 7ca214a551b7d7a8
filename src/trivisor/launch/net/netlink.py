"""The few netlink requests that every start of a machine makes (netlink(7), rtnetlink(7)).

pyroute2 does all of it and more, but takes some 10 ms for a link and 150 ms to be imported, which is longer than a container
lives; these few messages take a tenth of that. What is done once a boot (table.py) is left to pyroute2: see docs/decisions/.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Self

ROUTE, NETFILTER = 0, 12
NEWLINK, NEWADDR, NEWROUTE = 16, 20, 24
NEWQDISC, DELQDISC = 36, 37
GETCHAIN, GETRULE = 10 << 8 | 4, 10 << 8 | 7
"""NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN and NFT_MSG_GETRULE."""
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_ERROR, _DONE = 2, 3
_BATCH_BEGIN, _BATCH_END, _NFTABLES = 0x10, 0x11, 10
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BATCH = 16 << 20
_FAMILY = struct.Struct(">BBH")
_HEADER = struct.Struct("=IHHII")
_TIMEOUT = 10.0
_UP = 1

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_NET_NS_FD = 1, 3, 4, 18, 20, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_GATEWAY = 4, 5
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_TCA_KIND, _TCA_OPTIONS, _ROOT = 1, 2, 0xFFFFFFFF
_TBF_PARMS, _TBF_RATE64, _TBF_BURST_BYTES = 1, 4, 6
_NETEM_RATE, _NETEM_RATE64, _NETEM_LATENCY64 = 6, 8, 10
_REPLACE, _ETHERNET, _MAX = 0x100, 1, 0xFFFFFFFF
_TBF_BURST = 64 << 10
_NETEM_PACKETS = 10_000
_MAIN_TABLE, _STATIC, _UNICAST = 254, 4, 1

Message = tuple[int, int, bytes]
"""Type, flags, body."""


class Netlink:
    """A netlink socket of the calling thread's network namespace, used as a context manager."""

    def __init__(self, protocol: int = ROUTE, *, fd: int | None = None) -> None:
        """`fd`: a socket that is there already, taken over."""
        if fd is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        else:
            self._socket = socket.socket(fileno=fd)
        self._socket.settimeout(_TIMEOUT)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def close(self) -> None:
        self._socket.close()

    def receive(self, most: int) -> bytes:
        """Return what the kernel has to say, waited for. Raises OSError."""
        return self._socket.recv(most)

    def fileno(self) -> int:
        return self._socket.fileno()

    def batch(self, messages: Sequence[Message]) -> None:
        """Have nftables carry out all of `messages` or nothing. Raises OSError."""
        self._forget()
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):  # it is one message, and as many answers before we read the first
            self._socket.setsockopt(socket.SOL_SOCKET, option, _BATCH)
        marks = struct.pack(">BBH", 0, 0, _NFTABLES)
        self._ask([(_BATCH_BEGIN, 0, marks), *messages, (_BATCH_END, 0, marks)], range(1, len(messages) + 1))

    def _forget(self) -> None:
        """Read what answers somebody who used this socket before us and did not live to read it."""
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(65536):
                continue
        self._socket.settimeout(_TIMEOUT)

    def ask(self, messages: Sequence[Message]) -> None:
        """Have the kernel carry out `messages` in order, all sent at once. Raises OSError for the first that fails."""
        self._ask(messages, range(len(messages)))

    def _ask(self, messages: Sequence[Message], answered: range) -> None:
        """`answered`: those whose answers are waited for. Whether a batch's marks are answered depends on the kernel's version."""
        packed = b""
        waiting = set()
        for number, (kind, flags, body) in enumerate(messages):
            self._sequence += 1
            if number in answered:
                flags |= _ACK
                waiting.add(self._sequence)
            packed += _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0) + body
        self._socket.send(packed)
        failed = 0
        while waiting:
            data = self._socket.recv(65536)
            while len(data) >= _HEADER.size:
                length, kind, _, sequence, _ = _HEADER.unpack_from(data)
                if kind == _ERROR and sequence in waiting:
                    waiting.discard(sequence)
                    (code,) = struct.unpack_from("=i", data, _HEADER.size)
                    failed = failed or -code
                data = data[(length + 3) & ~3 :]
        if failed:
            raise OSError(failed, os.strerror(failed))

    def dump(self, kind: int) -> Iterator[tuple[int, bytes]]:
        """Yield (family, attributes) of each of nftables' objects of one kind. Raises OSError."""
        self._sequence += 1
        body = _FAMILY.pack(socket.AF_UNSPEC, 0, 0)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, self._sequence, 0) + body)
        while True:
            data = self._socket.recv(1 << 20)
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
                if kind == _ERROR:
                    (code,) = struct.unpack_from("=i", body)
                    raise OSError(-code, os.strerror(-code))
                if kind == _DONE:
                    return
                yield body[0], body[_FAMILY.size :]


def attributes(data: bytes) -> dict[int, bytes]:
    """Take attributes apart: {type: value}, of nested ones the bytes."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def new_veth(index: int, name: str, mac: str, mtu: int, *, peer: str, peer_namespace: int) -> Message:
    """Make the pair `name` here, with the given index, and `peer` in the namespace of a descriptor."""
    other = _link(0, 0) + text(_IFLA_IFNAME, peer) + _number(_IFLA_MTU, mtu) + _number(_IFLA_NET_NS_FD, peer_namespace)
    kind = text(_INFO_KIND, "veth") + attribute(_INFO_DATA, attribute(_VETH_INFO_PEER, other))
    here = text(_IFLA_IFNAME, name) + _number(_IFLA_MTU, mtu) + attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
    return NEWLINK, _CREATE | _EXCL, _link(index, 0) + here + attribute(_IFLA_LINKINFO, kind)


def up(index: int, *, alias: str = "") -> Message:
    """Bring an interface up; `alias` says whose it is."""
    return NEWLINK, 0, _link(index, _UP) + (text(_IFLA_IFALIAS, alias) if alias else b"")


def address(index: int, ip: str, length: int) -> Message:
    """Give an interface an IPv4 address of a network of `length` bits."""
    value = socket.inet_aton(ip)
    body = struct.pack("=BBBBI", socket.AF_INET, length, 0, 0, index)
    return NEWADDR, _CREATE | _EXCL, body + attribute(_IFA_LOCAL, value) + attribute(_IFA_ADDRESS, value)


def default_route(index: int, gateway: str) -> Message:
    """Send what is for no network of its own to `gateway`."""
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, _MAIN_TABLE, _STATIC, 0, _UNICAST, 0)
    return NEWROUTE, _CREATE | _EXCL, body + attribute(_RTA_GATEWAY, socket.inet_aton(gateway)) + _number(_RTA_OIF, index)


def tbf(index: int, rate: int) -> Message:
    """Let `rate` bytes a second leave an interface, with a queue of a tenth of a second (tc-tbf(8))."""
    burst = max(rate // 100, _TBF_BURST)
    limit = min(max(rate // 10, _TBF_BURST) + burst, _MAX)
    parameters = struct.pack("=BBHhHI12xIII", 0, _ETHERNET, 0, 0, 0, min(rate, _MAX), limit, 0, 0)
    options = attribute(_TBF_PARMS, parameters) + _number(_TBF_BURST_BYTES, min(burst, _MAX))
    if rate > _MAX:
        options += attribute(_TBF_RATE64, struct.pack("=Q", rate))
    return NEWQDISC, _CREATE | _REPLACE, _qdisc(index, "tbf", options)


def netem(index: int, latency: int, rate: int) -> Message:
    """Have what leaves an interface wait `latency` nanoseconds, and no more than `rate` bytes a second leave it (0: any) (tc-netem(8))."""
    waiting = max(_NETEM_PACKETS, rate // 1000)
    options = struct.pack("=IIIIII", 0, waiting, 0, 0, 0, 0) + attribute(_NETEM_LATENCY64, struct.pack("=q", latency))
    if rate:
        options += attribute(_NETEM_RATE, struct.pack("=IiIi", min(rate, _MAX), 0, 0, 0))
    if rate > _MAX:
        options += attribute(_NETEM_RATE64, struct.pack("=Q", rate))
    return NEWQDISC, _CREATE | _REPLACE, _qdisc(index, "netem", options)


def no_queue(index: int) -> Message:
    """Give an interface its own queue back."""
    return DELQDISC, 0, struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0, _ROOT, 0)


def _qdisc(index: int, kind: str, options: bytes) -> bytes:
    header = struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0, _ROOT, 0)
    return header + text(_TCA_KIND, kind) + attribute(_TCA_OPTIONS, options)


def chain(family: int, table: str, name: str) -> Message:
    """Ask for a chain of nftables: that it is there."""
    return GETCHAIN, 0, struct.pack(">BBH", family, 0, 0) + text(_CHAIN_TABLE, table) + text(_CHAIN_NAME, name)


def _link(index: int, flags: int) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))
