"""The host's side of USB redirection (usb-redirection-protocol.md of usbredir, version 0.7), without sockets.

The hello has ids of 32 bits; since both sides can 64, all after it have those. The other side is an engine that a guest may have taken:
lengths are bounded, and what breaks the protocol is a ProtocolError, which ends the connection and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from trivisor.vos.devices.serving import ProtocolError

MAX_PACKET = 4 << 20
_VERSION = b"trivisor"
_CAPS = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6
"""connect_device_version, ep_info_max_packet_size, 64bits_ids, 32bits_bulk_length."""
_NEEDED = 1 << 4 | 1 << 5 | 1 << 6
_OLD_HEADER, _HEADER = struct.Struct("<III"), struct.Struct("<IIQ")
CONTROL, BULK, INTERRUPT = struct.Struct("<BBBBHHH"), struct.Struct("<BBHIH"), struct.Struct("<BBH")
NO_ENDPOINT = 255


class Type(IntEnum):
    """Packets that are understood."""

    HELLO = 0
    DEVICE_CONNECT = 1
    DEVICE_DISCONNECT = 2
    RESET = 3
    INTERFACE_INFO = 4
    EP_INFO = 5
    SET_CONFIGURATION = 6
    GET_CONFIGURATION = 7
    CONFIGURATION_STATUS = 8
    SET_ALT_SETTING = 9
    GET_ALT_SETTING = 10
    ALT_SETTING_STATUS = 11
    START_ISO = 12
    ISO_STATUS = 14
    START_INTERRUPT = 15
    STOP_INTERRUPT = 16
    INTERRUPT_STATUS = 17
    CANCEL = 21
    CONTROL = 100
    BULK = 101
    ISO = 102
    INTERRUPT = 103


class Status(IntEnum):
    """How a transfer went."""

    SUCCESS = 0
    CANCELLED = 1
    INVALID = 2
    IO_ERROR = 3
    STALL = 4


_HEADS = {
    Type.RESET: 0,
    Type.SET_CONFIGURATION: 1,
    Type.GET_CONFIGURATION: 0,
    Type.SET_ALT_SETTING: 2,
    Type.GET_ALT_SETTING: 1,
    Type.START_ISO: 3,
    Type.START_INTERRUPT: 1,
    Type.STOP_INTERRUPT: 1,
    Type.CANCEL: 0,
    Type.CONTROL: CONTROL.size,
    Type.BULK: BULK.size,
    Type.ISO: 4,
    Type.INTERRUPT: INTERRUPT.size,
}
"""What is taken, and how long its own header is."""


class Stall(Exception):
    """A device's function raises it to refuse a request, as devices do."""


def packet(kind: Type, number: int, head: bytes, data: bytes = b"") -> bytes:
    """Return a packet as it is sent after the hello."""
    return _HEADER.pack(kind, len(head) + len(data), number) + head + data


@dataclass(frozen=True)
class Packet:
    """One packet from the engine."""

    kind: Type
    number: int
    head: bytes
    data: bytes = b""

    @property
    def what(self) -> str:
        """What it is, in a word."""
        return self.kind.name.lower()

    @property
    def endpoint(self) -> int:
        """The address of the endpoint that it is about; IN ones have bit 7."""
        return self.head[0] if self.head else 0

    @property
    def length(self) -> int:
        """Bytes that a transfer may move at most."""
        if self.kind is Type.CONTROL:
            return int(CONTROL.unpack(self.head)[6])
        if self.kind is Type.BULK:
            _, _, low, _, high = BULK.unpack(self.head)
            return int(low | high << 16)
        return int.from_bytes(self.head[2:4], "little")

    @property
    def unasked(self) -> bytes | None:
        """Isochronous transfers are not offered, and refused."""
        if self.kind is Type.START_ISO:
            return packet(Type.ISO_STATUS, self.number, bytes([Status.STALL, self.endpoint]))
        return b"" if self.kind is Type.ISO else None

    def answer(self, status: Status, data: bytes = b"") -> bytes:
        """Return the answer to a transfer; `data` is what was read, for IN."""
        inward = self.endpoint & 0x80
        moved = len(data) if inward else (self.length if status is Status.SUCCESS else 0)
        sent = data if inward else b""
        if self.kind is Type.CONTROL:
            endpoint, request, kind, _, value, index, _ = CONTROL.unpack(self.head)
            return packet(self.kind, self.number, CONTROL.pack(endpoint, request, kind, status, value, index, moved), sent)
        if self.kind is Type.BULK:
            stream = BULK.unpack(self.head)[3]
            return packet(self.kind, self.number, BULK.pack(self.endpoint, status, moved & 0xFFFF, stream, moved >> 16), sent)
        return packet(self.kind, self.number, INTERRUPT.pack(self.endpoint, status, moved), sent)

    def failed(self, error: BaseException) -> bytes:
        """Return the answer to a packet whose function raised `error`, or took too long."""
        status = Status.STALL if isinstance(error, Stall) else Status.IO_ERROR
        if self.kind in (Type.CONTROL, Type.BULK, Type.INTERRUPT):
            return self.answer(status)
        if self.kind in (Type.SET_CONFIGURATION, Type.GET_CONFIGURATION):
            return packet(Type.CONFIGURATION_STATUS, self.number, bytes([status, 0]))
        if self.kind in (Type.SET_ALT_SETTING, Type.GET_ALT_SETTING):
            return packet(Type.ALT_SETTING_STATUS, self.number, bytes([status, self.endpoint, 0]))
        if self.kind is Type.START_INTERRUPT:
            return packet(Type.INTERRUPT_STATUS, self.number, bytes([status, self.endpoint]))
        return b""


class Session:
    """One attached device's connection. `announce` is what is sent once both know each other: info and connect."""

    def __init__(self, announce: bytes) -> None:
        self._announce = announce
        self._buffer = bytearray()
        hello = _VERSION.ljust(64, b"\0") + struct.pack("<I", _CAPS)
        self._out = bytearray(_OLD_HEADER.pack(Type.HELLO, len(hello), 0) + hello)
        self._met = False
        self.done = False
        """Whether the other side has taken its leave; it just hangs up."""

    def output(self) -> bytes:
        """Return what is to be sent now."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Take what the engine sent; yield the packets in it. Raises ProtocolError."""
        self._buffer += data
        if not self._met and not self._meet():
            return
        while len(self._buffer) >= _HEADER.size:
            kind, length, number = _HEADER.unpack_from(self._buffer)
            if length > MAX_PACKET:
                raise ProtocolError(f"a packet of {length} bytes")
            if len(self._buffer) < _HEADER.size + length:
                return
            body = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
            del self._buffer[: _HEADER.size + length]
            found = _parse(kind, number, body)
            if found is not None:
                yield found

    def _meet(self) -> bool:
        if len(self._buffer) < _OLD_HEADER.size:
            return False
        kind, length, _ = _OLD_HEADER.unpack_from(self._buffer)
        if kind != Type.HELLO or not 68 <= length <= 128:
            raise ProtocolError("what is no hello")
        if len(self._buffer) < _OLD_HEADER.size + length:
            return False
        (caps,) = struct.unpack_from("<I", self._buffer, _OLD_HEADER.size + 64)
        if caps & _NEEDED != _NEEDED:
            raise ProtocolError(f"capabilities {caps:#x} are too few")
        del self._buffer[: _OLD_HEADER.size + length]
        self._met = True
        self._out += self._announce
        return True


def _parse(kind: int, number: int, body: bytes) -> Packet | None:
    """Return the packet, None for one that is not for us. Raises ProtocolError for one whose parts do not fit."""
    if kind not in list(Type) or Type(kind) not in _HEADS:
        return None
    size = _HEADS[Type(kind)]
    if len(body) < size:
        raise ProtocolError(f"a {Type(kind).name} of {len(body)} bytes")
    found = Packet(Type(kind), number, body[:size], body[size:])
    if found.kind in (Type.CONTROL, Type.BULK, Type.INTERRUPT):
        expected = 0 if found.endpoint & 0x80 else found.length
        if len(found.data) != expected or found.length > MAX_PACKET:
            raise ProtocolError(f"a {found.what} transfer of {found.length} bytes with {len(found.data)}")
    elif found.data:
        raise ProtocolError(f"a {found.what} with {len(found.data)} bytes too many")
    return found
