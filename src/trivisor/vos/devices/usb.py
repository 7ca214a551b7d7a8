"""A USB device made of Python: subclass UsbDevice, say what it looks like, and attach an object of it.

Enumeration is answered here, from `interfaces` and the names. A subclass gives what its interfaces do: `control` for requests of its
class or vendor, `received` for what the host (the guest's driver) sends, and `send` puts what it shall read at an IN endpoint.
Functions are called in a thread of this process, one call at a time; what raises, or takes longer than `timeout`, the guest sees as a
transfer that failed (Stall: refused). When this process ends, or detaches the device, the guest sees it pulled out.

USB 2.0, chapter 9 (usb.org). Bulk, interrupt and control; nothing isochronous.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

from trivisor.core.devices import Served
from trivisor.core.errors import InvalidSpec, InvalidState
from trivisor.vos.devices import usbredir
from trivisor.vos.devices.serving import Server
from trivisor.vos.devices.usbredir import NO_ENDPOINT, Packet, Session, Stall, Status, Type, packet

KEPT = 16
MAX_QUEUED = 16 << 20
"""Bytes that `send` keeps for a guest that does not read."""
MAX_READS = 256
"""Reads of an endpoint that wait for data."""
_KINDS = {"bulk": 2, "interrupt": 3}
_SPEEDS = {"full": 1, "high": 2}


@dataclass(frozen=True)
class Endpoint:
    """One endpoint; IN ones (towards the guest) have bit 7 in their address. `interval` is as the descriptor has it."""

    address: int
    kind: Literal["bulk", "interrupt"] = "bulk"
    size: int = 512
    interval: int = 0


@dataclass(frozen=True)
class Interface:
    """One interface, with the class's own descriptors in `extra`."""

    cls: int
    subclass: int = 0
    protocol: int = 0
    endpoints: tuple[Endpoint, ...] = ()
    extra: bytes = b""


@dataclass(frozen=True)
class Setup:
    """A control request (USB 2.0, 9.3). IN ones have bit 7 in `kind`."""

    kind: int
    request: int
    value: int
    index: int
    length: int


class UsbDevice:
    """A device. Subclasses set what differs."""

    vendor = 0x1209
    product = 0x0001
    """By default an id that pid.codes keeps for trials."""
    release = 0x0100
    cls, subclass, protocol = 0, 0, 0
    names: tuple[str, str] = ("Trivisor", "device")
    """Maker and product. The serial number is the name that it is attached under."""
    speed: Literal["full", "high"] = "high"
    interfaces: tuple[Interface, ...] = ()

    def __init__(self, *, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self.faults: deque[BaseException] = deque(maxlen=KEPT)
        """What the functions raised last."""
        self.serial = ""
        self._line: _Line | None = None
        _check(self)

    def control(self, setup: Setup, data: bytes) -> bytes:
        """Answer a request of class or vendor, or a standard one to an interface; for IN return at most `setup.length` bytes."""
        raise Stall

    def received(self, endpoint: int, data: bytes) -> None:
        """Take what the guest sent to an OUT endpoint."""

    def reset(self) -> None:
        """Begin anew: the guest has reset the device. What was queued is gone."""

    def send(self, endpoint: int, data: bytes) -> None:
        """Queue one message for an IN endpoint: the guest reads it whole, or in as many transfers as it takes.

        Raises InvalidState if it is attached nowhere, BufferError if the guest has left too much unread.
        """
        if self._line is None:
            raise InvalidState("", "not attached", "send to the guest", ["attached"])
        self._line.send(endpoint, data)

    def take_back(self, endpoint: int) -> None:
        """Forget what is queued for an IN endpoint and has not been read."""
        if self._line is not None:
            self._line.take_back(endpoint)

    def halt(self, endpoint: int) -> None:
        """Refuse every transfer at an endpoint until the guest clears the halt (USB 2.0, 9.4.5), or resets the device."""
        if self._line is not None:
            self._line.halt(endpoint)

    def late(self, endpoint: int) -> bool:
        """Learn that `received` has taken too long for what the guest sent to `endpoint`: that transfer fails, unless this returns True.

        Called while `received` still runs, which may not be waited for.
        """
        return False

    def served(self) -> Served:
        """Return what the machine is told about it."""
        return Served("usb")

    def serve(self, sock: socket.socket, name: str = "") -> Server[Packet]:
        """Answer on `sock`, which is the server's from now on."""
        self.serial = name
        self._line = _Line(self, sock)
        self._line.server.start()
        return self._line.server


class _Line:
    """The host's end of one attached device: what is configured, what is queued, who waits."""

    def __init__(self, device: UsbDevice, sock: socket.socket) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._queues: dict[int, deque[bytes]] = {}
        self._waiting: dict[int, deque[Packet]] = {}
        self._receiving: set[int] = set()
        self._halted: set[int] = set()
        self._configuration = 1
        self._number = 0
        announce = _info(device) + packet(Type.DEVICE_CONNECT, 0, _connect(device))
        self.server = Server(sock, Session(announce), self._answer, device.timeout, self._failed, self._late)

    def send(self, endpoint: int, data: bytes) -> None:
        kind = next((one.kind for face in self._device.interfaces for one in face.endpoints if one.address == endpoint), None)
        if kind is None or not endpoint & 0x80:
            raise InvalidSpec(f"the device has no endpoint {endpoint:#x} to send by")
        with self._lock:
            queued = self._queues.setdefault(endpoint, deque())
            if sum(map(len, queued)) + len(data) > MAX_QUEUED:
                raise BufferError(f"the guest has left {MAX_QUEUED >> 20} MiB unread")
            queued.append(bytes(data))
            out = self._match(endpoint)
        self.server.push(out)

    def take_back(self, endpoint: int) -> None:
        with self._lock:
            self._queues.pop(endpoint, None)

    def halt(self, endpoint: int) -> None:
        with self._lock:
            self._halted.add(endpoint)
            out = b"".join(asked.answer(Status.STALL) for asked in self._waiting.pop(endpoint, ()))
        self.server.push(out)

    def _late(self, asked: Packet, error: BaseException) -> bytes:
        outward = asked.kind in (Type.BULK, Type.INTERRUPT) and not asked.endpoint & 0x80
        return asked.answer(Status.SUCCESS) if outward and self._device.late(asked.endpoint) else asked.failed(error)

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, Stall):
            self._device.faults.append(error)

    def _match(self, endpoint: int) -> bytes:
        """Return the answers to those that wait and can be served. Under the lock."""
        out, queued = b"", self._queues.get(endpoint, deque())
        while queued and endpoint in self._receiving:
            data = queued.popleft()
            self._number += 1
            out += packet(Type.INTERRUPT, self._number, usbredir.INTERRUPT.pack(endpoint, Status.SUCCESS, len(data)), data)
        waiting = self._waiting.get(endpoint, deque())
        while queued and waiting:
            asked, data = waiting.popleft(), queued.popleft()
            if len(data) > asked.length:
                queued.appendleft(data[asked.length :])
            out += asked.answer(Status.SUCCESS, data[: asked.length])
        return out

    def _answer(self, asked: Packet) -> bytes:
        if asked.kind is Type.CONTROL:
            return self._control(asked)
        if asked.kind in (Type.BULK, Type.INTERRUPT):
            return self._transfer(asked)
        if asked.kind is Type.CANCEL:
            return self._cancel(asked.number)
        if asked.kind is Type.RESET:
            with self._lock:
                self._queues.clear()
                self._waiting.clear()
                self._receiving.clear()
                self._halted.clear()
            self._device.reset()
            return b""
        return self._state(asked)

    def _transfer(self, asked: Packet) -> bytes:
        with self._lock:
            if asked.endpoint in self._halted:
                return asked.answer(Status.STALL)
            if asked.endpoint & 0x80:
                waiting = self._waiting.setdefault(asked.endpoint, deque())
                if len(waiting) >= MAX_READS:
                    return asked.answer(Status.IO_ERROR)
                waiting.append(asked)
                return self._match(asked.endpoint)
        self._device.received(asked.endpoint, asked.data)
        return asked.answer(Status.SUCCESS)

    def _state(self, asked: Packet) -> bytes:
        """Configurations, settings, and which interrupts are wanted."""
        if asked.kind is Type.SET_CONFIGURATION:
            self._configuration = asked.head[0]
            return _info(self._device) + packet(Type.CONFIGURATION_STATUS, asked.number, bytes([Status.SUCCESS, asked.head[0]]))
        if asked.kind is Type.GET_CONFIGURATION:
            return packet(Type.CONFIGURATION_STATUS, asked.number, bytes([Status.SUCCESS, self._configuration]))
        if asked.kind in (Type.SET_ALT_SETTING, Type.GET_ALT_SETTING):
            status = Status.STALL if asked.kind is Type.SET_ALT_SETTING and asked.head[1] else Status.SUCCESS
            told = _info(self._device) if asked.kind is Type.SET_ALT_SETTING else b""
            return told + packet(Type.ALT_SETTING_STATUS, asked.number, bytes([status, asked.head[0], 0]))
        with self._lock:
            (self._receiving.add if asked.kind is Type.START_INTERRUPT else self._receiving.discard)(asked.endpoint)
            status_packet = packet(Type.INTERRUPT_STATUS, asked.number, bytes([Status.SUCCESS, asked.endpoint]))
            return status_packet + self._match(asked.endpoint)

    def _cancel(self, number: int) -> bytes:
        with self._lock:
            for waiting in self._waiting.values():
                for asked in waiting:
                    if asked.number == number:
                        waiting.remove(asked)
                        return asked.answer(Status.CANCELLED)
        return b""

    def _control(self, asked: Packet) -> bytes:
        _, request, kind, _, value, index, length = usbredir.CONTROL.unpack(asked.head)
        standard = self._standard(kind, request, value, index & 0xFF)
        data = self._device.control(Setup(kind, request, value, index, length), asked.data) if standard is None else standard
        if not isinstance(data, bytes | bytearray):
            raise TypeError(f"control returned {type(data).__name__}, not bytes")
        return asked.answer(Status.SUCCESS, bytes(data[:length]))

    def _standard(self, kind: int, request: int, value: int, endpoint: int) -> bytes | None:
        """Return the answer to a standard request that is the same for every device, None for others."""
        if kind == 0x80 and request == 6:
            return descriptor(self._device, value >> 8, value & 0xFF)
        if kind in (0x80, 0x81, 0x82) and request == 0:
            return bytes([kind == 0x82 and endpoint in self._halted, 0])
        if kind == 0x02 and value == 0 and request in (1, 3):
            with self._lock:
                (self._halted.discard if request == 1 else self._halted.add)(endpoint)
        return b"" if kind in (0x00, 0x01, 0x02) and request in (1, 3) else None


def descriptor(device: UsbDevice, kind: int, number: int) -> bytes:
    """Return a standard descriptor (USB 2.0, 9.6). Raises Stall for one that there is not."""
    if kind == 1:
        head = (18, 1, 0x0200, device.cls, device.subclass, device.protocol, 64, device.vendor, device.product, device.release, 1, 2, 3, 1)
        return struct.pack("<BBHBBBBHHHBBBB", *head)
    if kind == 2 and number == 0:
        body = b"".join(_interface(index, face) for index, face in enumerate(device.interfaces))
        return struct.pack("<BBHBBBBB", 9, 2, 9 + len(body), len(device.interfaces), 1, 0, 0x80, 50) + body
    if kind == 3 and number <= 3:
        text = struct.pack("<H", 0x0409) if number == 0 else (*device.names, device.serial)[number - 1].encode("utf-16-le")[:252]
        return bytes([2 + len(text), 3]) + text
    raise Stall


def _interface(index: int, face: Interface) -> bytes:
    out = struct.pack("<BBBBBBBBB", 9, 4, index, 0, len(face.endpoints), face.cls, face.subclass, face.protocol, 0) + face.extra
    for one in face.endpoints:
        out += struct.pack("<BBBBHB", 7, 5, one.address, _KINDS[one.kind], one.size, one.interval)
    return out


def _connect(device: UsbDevice) -> bytes:
    speed = _SPEEDS[device.speed]
    return struct.pack("<BBBBHHH", speed, device.cls, device.subclass, device.protocol, device.vendor, device.product, device.release)


def _info(device: UsbDevice) -> bytes:
    """Return the packets that say which interfaces and endpoints there are."""
    faces = device.interfaces
    columns = [range(len(faces)), [face.cls for face in faces], [face.subclass for face in faces], [face.protocol for face in faces]]
    interfaces = struct.pack("<I", len(faces)) + b"".join(bytes(column).ljust(32, b"\0") for column in columns)
    kinds, intervals, owners, sizes = [NO_ENDPOINT] * 32, [0] * 32, [0] * 32, [0] * 32
    for at in (0, 16):
        kinds[at], sizes[at] = 0, 64
    for number, face in enumerate(faces):
        for one in face.endpoints:
            at = one.address & 15 | (one.address & 0x80) >> 3
            kinds[at], intervals[at], owners[at], sizes[at] = _KINDS[one.kind], one.interval, number, one.size
    endpoints = bytes(kinds) + bytes(intervals) + bytes(owners) + struct.pack("<32H", *sizes)
    return packet(Type.INTERFACE_INFO, 0, interfaces) + packet(Type.EP_INFO, 0, endpoints)


def _check(device: UsbDevice) -> None:
    if not 1 <= len(device.interfaces) <= 32:
        raise InvalidSpec(f"a USB device has 1 to 32 interfaces, not {len(device.interfaces)}")
    seen = [one.address for face in device.interfaces for one in face.endpoints]
    if len(set(seen)) != len(seen) or any(address & ~0x8F or not address & 15 for address in seen):
        raise InvalidSpec("each endpoint of a USB device has an address of its own: 1 to 15, and 0x81 to 0x8f for IN")
