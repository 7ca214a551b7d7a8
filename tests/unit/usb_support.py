"""An engine's end of a redirected USB device, for tests of devices made of Python."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trivisor.vos.devices import UsbDevice
from trivisor.vos.devices import usbredir as wire
from trivisor.vos.devices.serving import Server
from trivisor.vos.devices.usbredir import Type

HELLO = struct.pack("<III", 0, 68, 0) + b"engine".ljust(64, b"\0") + struct.pack("<I", 1 << 4 | 1 << 5 | 1 << 6)


def control(kind: int, request: int, value: int = 0, length: int = 0, data: bytes = b"", *, number: int = 1) -> bytes:
    endpoint = kind & 0x80
    return wire.packet(Type.CONTROL, number, wire.CONTROL.pack(endpoint, request, kind, 0, value, 0, length), data)


def bulk(endpoint: int, length: int, data: bytes = b"", *, number: int = 1) -> bytes:
    return wire.packet(Type.BULK, number, wire.BULK.pack(endpoint, 0, length & 0xFFFF, 0, length >> 16), data)


class Engine:
    """The other end, which has met the device."""

    def __init__(self, sock: socket.socket, server: Server[Any]) -> None:
        self.socket, self.server = sock, server
        sock.settimeout(30)
        assert self.take(80)[:4] == bytes(4)
        sock.sendall(HELLO)
        assert [self.packet()[0] for _ in range(3)] == [Type.INTERFACE_INFO, Type.EP_INFO, Type.DEVICE_CONNECT]

    def patience(self, seconds: float) -> None:
        """How long a function may take from now on: short for one that is to be late, long for those that are not."""
        self.server._timeout = seconds

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def packet(self) -> tuple[int, int, bytes]:
        kind, length, number = struct.unpack("<IIQ", self.take(16))
        return kind, number, self.take(length)

    def control(self, kind: int, request: int, value: int = 0, length: int = 255) -> tuple[int, bytes]:
        self.socket.sendall(control(kind, request, value, length))
        _, _, body = self.packet()
        return body[3], body[10:]

    def clear_halt(self, endpoint: int) -> None:
        self.socket.sendall(wire.packet(Type.CONTROL, 1, wire.CONTROL.pack(0, 1, 0x02, 0, 0, endpoint, 0)))
        assert self.packet()[2][3] == 0

    def bulk(self, endpoint: int, length: int, data: bytes = b"") -> tuple[int, bytes]:
        self.socket.sendall(bulk(endpoint, length, data))
        _, _, body = self.packet()
        return body[1], body[10:]


@contextmanager
def attached(device: UsbDevice) -> Iterator[Engine]:
    ours, theirs = socket.socketpair()
    server = device.serve(ours, "name")
    with theirs:
        yield Engine(theirs, server)
    server.close()
    assert not server.open
