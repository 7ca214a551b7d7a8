"""USB devices made of Python, without a guest: the redirection protocol against any bytes, and what a device answers."""

from __future__ import annotations

import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usb_support import HELLO, attached, bulk

from trivisor.core.errors import InvalidSpec, InvalidState
from trivisor.vos.devices import Endpoint, Interface, Keyboard, Mouse, Setup, Stall, Tablet, UsbDevice
from trivisor.vos.devices import usbredir as wire
from trivisor.vos.devices.serving import ProtocolError
from trivisor.vos.devices.usb import MAX_READS
from trivisor.vos.devices.usbredir import Session, Status, Type


class Thing(UsbDevice):
    """Says at 0x81 what it got at 2; at 0x83 by interrupt."""

    interfaces = (Interface(255, 0, 0, (Endpoint(0x81), Endpoint(2), Endpoint(0x83, "interrupt", 8, 4))),)

    def __init__(self, **given: float) -> None:
        super().__init__(**given)
        self.resets = 0
        self.hold = threading.Event()
        self.hold.set()

    def control(self, setup: Setup, data: bytes) -> bytes:
        if setup.request == 1:
            return b"answer"
        if setup.request == 2:
            return None  # type: ignore[return-value]
        if setup.request == 3:
            self.hold.wait(20)
        if setup.request == 4:
            raise KeyError
        raise Stall

    def received(self, endpoint: int, data: bytes) -> None:
        self.send(0x81, data)

    def reset(self) -> None:
        self.resets += 1


def test_enumeration() -> None:
    with attached(Thing()) as engine:
        status, device = engine.control(0x80, 6, 1 << 8, 18)
        assert (status, device[:2], device[8:12]) == (0, b"\x12\x01", struct.pack("<HH", 0x1209, 1))
        status, configuration = engine.control(0x80, 6, 2 << 8)
        assert len(configuration) == struct.unpack_from("<H", configuration, 2)[0] == 9 + 9 + 3 * 7
        assert engine.control(0x80, 6, 2 << 8, 9)[1] == configuration[:9]
        assert engine.control(0x80, 6, 3 << 8 | 3)[1][2:].decode("utf-16-le") == "name"
        assert engine.control(0x80, 6, 6 << 8)[0] == Status.STALL, "no qualifier"
        assert engine.control(0x80, 0, 0, 2) == (0, bytes(2))
        engine.socket.sendall(wire.packet(Type.SET_CONFIGURATION, 7, b"\1"))
        answers = [engine.packet() for _ in range(3)]
        assert [kind for kind, _, _ in answers] == [Type.INTERFACE_INFO, Type.EP_INFO, Type.CONFIGURATION_STATUS]
        assert answers[2][1:] == (7, b"\0\1")


def test_what_functions_answer() -> None:
    device = Thing()
    with attached(device) as engine:
        assert engine.control(0xC0, 1) == (0, b"answer")
        assert engine.control(0xC0, 1, length=3) == (0, b"ans")
        assert engine.control(0xC0, 9)[0] == Status.STALL
        assert not device.faults, "a stall is an answer"
        assert engine.control(0xC0, 2)[0] == Status.IO_ERROR
        assert engine.control(0xC0, 4)[0] == Status.IO_ERROR
        assert [type(fault) for fault in device.faults] == [TypeError, KeyError]


def test_a_flood_of_reads_is_refused() -> None:
    """What waits for data is bounded, and served once there is some."""
    device = Thing()
    with attached(device) as engine:
        for number in range(300):
            engine.socket.sendall(bulk(0x81, 8, number=number))
        refused = [engine.packet() for _ in range(300 - MAX_READS)]
        assert {(number >= MAX_READS, body[1]) for _, number, body in refused} == {(True, Status.IO_ERROR)}
        device.send(0x81, b"first")
        _, number, body = engine.packet()
        assert (number, body[1], body[10:]) == (0, Status.SUCCESS, b"first")


def test_a_halted_endpoint() -> None:
    device = Thing()
    with attached(device) as engine:
        engine.socket.sendall(bulk(0x81, 8))
        while not device._line._waiting:  # type: ignore[union-attr]
            time.sleep(0.001)  # nobody tells of what has come
        device.halt(0x81)
        assert engine.packet()[2][1] == Status.STALL, "what waited is refused"
        assert engine.bulk(0x81, 8)[0] == Status.STALL
        assert engine.bulk(2, 2, b"ok") == (0, b""), "others go on"
        engine.clear_halt(0x81)
        assert engine.bulk(0x81, 8) == (0, b"ok")


def test_a_function_that_hangs() -> None:
    device = Thing(timeout=0.1)
    device.hold.clear()
    with attached(device) as engine:
        assert engine.control(0xC0, 3)[0] == Status.IO_ERROR
        engine.patience(20)
        assert engine.control(0xC0, 1) == (0, b"answer")
        device.hold.set()
    assert isinstance(device.faults[0], TimeoutError)


def test_transfers() -> None:
    device = Thing()
    with pytest.raises(InvalidState):
        device.send(0x81, b"early")
    with attached(device) as engine:
        assert engine.bulk(2, 5, b"hello") == (0, b"")
        assert engine.bulk(0x81, 3) == (0, b"hel")
        assert engine.bulk(0x81, 512) == (0, b"lo")
        engine.socket.sendall(bulk(0x81, 64, number=5) + wire.packet(Type.CANCEL, 5, b""))
        assert engine.packet()[2][1] == Status.CANCELLED, "who waits is let go"
        engine.socket.sendall(wire.packet(Type.START_INTERRUPT, 6, b"\x83"))
        assert engine.packet()[::2] == (Type.INTERRUPT_STATUS, b"\0\x83")
        device.send(0x83, b"event")
        assert engine.packet()[::2] == (Type.INTERRUPT, b"\x83\0\5\0event")
        engine.socket.sendall(wire.packet(Type.START_ISO, 8, b"\x84\1\1"))
        assert engine.packet()[2][0] == Status.STALL
        engine.socket.sendall(wire.packet(Type.RESET, 0, b""))
        assert engine.control(0xC0, 1)[0] == 0
        assert device.resets == 1
        with pytest.raises(InvalidSpec):
            device.send(0x85, b"")
        with pytest.raises(BufferError):
            for _ in range(64):
                device.send(0x81, bytes(1 << 20))


def test_who_talks_nonsense_is_hung_up_on() -> None:
    device = Thing()
    with attached(device) as engine:
        engine.socket.sendall(struct.pack("<IIQ", Type.BULK, wire.MAX_PACKET + 1, 0))
        with pytest.raises(EOFError):
            engine.take(1)
    assert isinstance(device.faults[-1], ProtocolError)


def test_devices_that_cannot_be() -> None:
    with pytest.raises(InvalidSpec):
        UsbDevice()

    class Twice(UsbDevice):
        interfaces = (Interface(255, endpoints=(Endpoint(0x81), Endpoint(0x81))),)

    with pytest.raises(InvalidSpec):
        Twice()


_PACKETS = st.builds(
    lambda kind, number, head, data: wire.packet(kind, number, head, data),
    st.sampled_from(list(Type)),
    st.integers(0, 9),
    st.binary(max_size=12),
    st.binary(max_size=12),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_PACKETS | st.binary(max_size=40), max_size=12), st.booleans(), st.integers(1, 60))
def test_any_bytes(pieces: list[bytes], met: bool, size: int) -> None:
    """Whatever comes, in whatever pieces: packets whose parts fit, or a ProtocolError; each has an answer to its failure."""
    session, data = Session(b""), (HELLO if met else b"") + b"".join(pieces)
    try:
        for start in range(0, len(data), size):
            for found in session.feed(data[start : start + size]):
                if found.kind in (Type.CONTROL, Type.BULK, Type.INTERRUPT):
                    assert len(found.data) == (0 if found.endpoint & 0x80 else found.length)
                assert isinstance(found.failed(Stall()), bytes)
                assert isinstance(found.unasked, bytes | None)
    except ProtocolError:
        pass
    assert len(session._buffer) <= wire.MAX_PACKET + 16


@settings(max_examples=60, deadline=None)
@given(st.lists(_PACKETS, max_size=12))
def test_a_device_survives_any_packets(packets: list[bytes]) -> None:
    """It goes on or hangs up; its threads end."""
    with attached(Thing()) as engine:
        engine.socket.sendall(b"".join(packets))


def test_keys() -> None:
    sent: list[bytes] = []
    keyboard = Keyboard()
    keyboard.send = lambda endpoint, data: sent.append(data)  # type: ignore[method-assign]
    keyboard.press("ctrl", "c")
    keyboard.type("A/\n")
    assert [data[:3] for data in sent[::2]] == [b"\1\0\6", b"\2\0\4", b"\0\0\x38", b"\0\0\x28"]
    assert set(sent[1::2]) == {bytes(8)}
    for wrong in ("\0", "no such key", "\N{EURO SIGN}"):
        with pytest.raises(InvalidSpec):
            keyboard.press(wrong)
    with pytest.raises(InvalidSpec):
        keyboard.press(*"abcdefg")
    with pytest.raises(InvalidSpec):
        Mouse().click("fourth")
    with pytest.raises(InvalidSpec):
        Tablet().move(0.5, 1.1)
