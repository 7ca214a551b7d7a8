"""What programs point to, as values: addresses, vectors, messages, structs, flags.

Pure functions from bytes, written for a hostile program: each looks at no more than it was given, bounds every count, never
recurses and raises nothing but ValueError (which call.py answers as EINVAL). Layouts are those that x86-64 and arm64 share.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from trivisor.vos.syscalls.flags import FLAGS, Flags, flags

__all__ = [
    "FLAGS",
    "STRUCTS",
    "Address",
    "Control",
    "Flags",
    "Message",
    "address",
    "controls",
    "encode_address",
    "fields",
    "flags",
    "iovec",
]

MAX_IOVEC = 1024
"""UIO_MAXIOV: longer vectors are EINVAL in the kernel, too."""
MAX_CONTROLS = 256
MAX_ADDRESS = 128
"""sizeof(struct sockaddr_storage)."""
MAX_CONTROL = 64 << 10

_WORD = 8
_IOVEC = struct.Struct("<QQ")
_MSGHDR = struct.Struct("<QI4xQQQQI4x")
_CMSGHDR = struct.Struct("<Qii")


@dataclass(frozen=True, slots=True)
class Address:
    """A socket address. `host` and `port` for inet and inet6 (also cid and port for vsock), `path` for unix (abstract: begins with @).

    `raw` is what the program gave; of another family nothing else is known. `family` is "AF_INET" and so on, or the number as text.
    """

    family: str
    host: str = ""
    port: int = 0
    path: str = ""
    scope: int = 0
    """inet6: the interface's number; netlink: the groups; packet: the interface's number."""
    raw: bytes = b""

    def __str__(self) -> str:
        if self.family == "AF_UNIX":
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}" if self.host else self.family


@dataclass(frozen=True, slots=True)
class Control:
    """One control message (cmsg(3)). `fds` are the program's descriptors, for SCM_RIGHTS."""

    level: int
    kind: int
    data: bytes

    @property
    def fds(self) -> tuple[int, ...]:
        rights = (self.level, self.kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        return struct.unpack(f"<{len(self.data) // 4}i", self.data[: len(self.data) // 4 * 4]) if rights else ()


@dataclass(frozen=True, slots=True)
class Message:
    """struct msghdr: where its parts are, and how long."""

    name: int
    name_length: int
    vector: int
    count: int
    control: int
    control_length: int
    flags: int


def address(raw: bytes) -> Address:
    """Decode a socket address of any family. One that is too short for its family keeps only `raw`. Raises ValueError beyond 128 bytes."""
    if len(raw) > MAX_ADDRESS:
        raise ValueError(f"an address of {len(raw)} bytes")
    if len(raw) < 2:
        return Address("AF_UNSPEC", raw=raw)
    number = int.from_bytes(raw[:2], "little")
    family = _FAMILIES.get(number, str(number))
    if number == socket.AF_UNIX:
        return Address(family, path=_unix(raw[2:]), raw=raw)
    if number == socket.AF_INET and len(raw) >= 8:
        return Address(family, str(ipaddress.IPv4Address(raw[4:8])), int.from_bytes(raw[2:4], "big"), raw=raw)
    if number == socket.AF_INET6 and len(raw) >= 24:
        scope = int.from_bytes(raw[24:28], "little")
        return Address(family, str(ipaddress.IPv6Address(raw[8:24])), int.from_bytes(raw[2:4], "big"), scope=scope, raw=raw)
    if number == socket.AF_NETLINK and len(raw) >= 12:
        return Address(family, port=int.from_bytes(raw[4:8], "little"), scope=int.from_bytes(raw[8:12], "little"), raw=raw)
    if number == socket.AF_PACKET and len(raw) >= 8:
        return Address(family, port=int.from_bytes(raw[2:4], "big"), scope=int.from_bytes(raw[4:8], "little"), raw=raw)
    if number == socket.AF_VSOCK and len(raw) >= 12:
        port, cid = struct.unpack_from("<II", raw, 4)
        return Address(family, str(cid), port, raw=raw)
    return Address(family, raw=raw)


def encode_address(host: str, port: int = 0, scope: int = 0) -> bytes:
    """Return the struct of an inet or inet6 address, or of a unix one where `host` is a path or begins with @. Raises ValueError."""
    if host.startswith(("/", "@")):
        name = os.fsencode(host)
        if len(name) > 107:
            raise ValueError(f"{host!r} is longer than a unix address")
        return struct.pack("<H", socket.AF_UNIX) + (b"\0" + name[1:] if host[0] == "@" else name + b"\0")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"{port} is no port")
    where = ipaddress.ip_address(host)
    if where.version == 4:
        return struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + where.packed + bytes(8)
    return struct.pack("<H", socket.AF_INET6) + struct.pack(">HI", port, 0) + where.packed + struct.pack("<I", scope)


def _unix(name: bytes) -> str:
    if name[:1] == b"\0":
        return "@" + os.fsdecode(name[1:]) if len(name) > 1 else ""
    return os.fsdecode(name.split(b"\0", 1)[0])


def iovec(raw: bytes) -> tuple[tuple[int, int], ...]:
    """Decode an array of struct iovec: (address, length) each. Raises ValueError beyond 1024, or if a piece is left."""
    if len(raw) % _IOVEC.size or len(raw) > MAX_IOVEC * _IOVEC.size:
        raise ValueError(f"a vector of {len(raw)} bytes")
    return tuple(_IOVEC.iter_unpack(raw))


def message(raw: bytes) -> Message:
    """Decode struct msghdr. Raises ValueError if it is not whole, or its parts are beyond what the kernel takes."""
    if len(raw) != _MSGHDR.size:
        raise ValueError(f"a msghdr of {len(raw)} bytes")
    found = Message(*_MSGHDR.unpack(raw))
    if found.count > MAX_IOVEC or found.control_length > MAX_CONTROL or found.name_length > MAX_ADDRESS:
        raise ValueError("a msghdr with too long parts")
    return found


def controls(raw: bytes) -> tuple[Control, ...]:
    """Decode control messages, as far as they are well formed (cmsg(3): a broken one ends the list)."""
    found: list[Control] = []
    at = 0
    while at + _CMSGHDR.size <= len(raw) and len(found) < MAX_CONTROLS:
        length, level, kind = _CMSGHDR.unpack_from(raw, at)
        if length < _CMSGHDR.size or length > len(raw) - at:
            break
        found.append(Control(level, kind, raw[at + _CMSGHDR.size : at + length]))
        at += -(-length // _WORD) * _WORD
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Layout:
    """A struct of numbers and texts: names in order, and how they are packed."""

    names: tuple[str, ...]
    packing: struct.Struct

    @property
    def size(self) -> int:
        return self.packing.size


def _layout(names: str, packing: str) -> Layout:
    return Layout(tuple(names.split()), struct.Struct("<" + packing))


STRUCTS: Mapping[str, Layout] = {
    "timespec": _layout("tv_sec tv_nsec", "qq"),
    "timespec2": _layout("atime_sec atime_nsec mtime_sec mtime_nsec", "4q"),
    "timeval": _layout("tv_sec tv_usec", "qq"),
    "timeval2": _layout("atime_sec atime_usec mtime_sec mtime_usec", "4q"),
    "itimerspec": _layout("interval_sec interval_nsec value_sec value_nsec", "4q"),
    "rlimit": _layout("rlim_cur rlim_max", "QQ"),
    "utsname": _layout("sysname nodename release version machine domainname", "65s65s65s65s65s65s"),
    "sysinfo": _layout(
        "uptime load1 load5 load15 totalram freeram sharedram bufferram totalswap freeswap procs totalhigh freehigh mem_unit",
        "q9QH6xQQI4x",
    ),
    "open_how": _layout("flags mode resolve", "QQQ"),
    "clone_args": _layout("flags pidfd child_tid parent_tid exit_signal stack stack_size tls", "8Q"),
    "epoll_event": _layout("events data", "IQ"),
}
"""By the kind of argument (table.py). epoll_event is packed on x86-64 only."""

Fields = dict[str, int | str]


def fields(kind: str, raw: bytes) -> Fields:
    """Decode a struct of STRUCTS by its name. Raises ValueError if `raw` is shorter."""
    layout = STRUCTS[kind]
    if len(raw) < layout.size:
        raise ValueError(f"a {kind} of {len(raw)} bytes")
    return {name: _text(value) for name, value in zip(layout.names, layout.packing.unpack_from(raw), strict=True)}


def encode_fields(kind: str, values: Mapping[str, int | str | bytes]) -> bytes:
    """Return the struct with these values, 0 or empty for those left out. Raises ValueError for one that it cannot hold."""
    layout = STRUCTS[kind]
    unknown = set(values) - set(layout.names)
    if unknown:
        raise ValueError(f"a {kind} has no {', '.join(sorted(unknown))}; it has {', '.join(layout.names)}")
    texts = "s" in layout.packing.format
    words = [values.get(name, b"" if texts else 0) for name in layout.names]
    raw = [os.fsencode(word)[:64] if isinstance(word, str | bytes) else word for word in words]
    try:
        return layout.packing.pack(*raw)
    except struct.error as error:
        raise ValueError(f"a {kind} cannot hold that: {error}") from error


def _text(value: int | bytes) -> int | str:
    return value if isinstance(value, int) else os.fsdecode(value.split(b"\0", 1)[0])


_FAMILIES = {int(getattr(socket, name)): name for name in sorted(dir(socket), reverse=True) if name.startswith("AF_")}
