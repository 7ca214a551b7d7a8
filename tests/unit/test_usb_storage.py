"""A USB stick made of Python, without a guest: commands, and a host that breaks every rule."""

from __future__ import annotations

import errno
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usb_support import Engine, attached

from trivisor.core.errors import InvalidSpec
from trivisor.vos.devices import BlockDevice, UsbStorage
from trivisor.vos.devices.usbredir import Status

IN, OUT = 0x81, 2
SECTOR = 512


class Content(BlockDevice):
    """Sectors that hold their number; sector 7 is bad, 8 raises ENOSPC, 9 answers garbage, 10 hangs while `hold` is clear."""

    def __init__(self, **given: float) -> None:
        super().__init__(64 * SECTOR, **given)  # type: ignore[arg-type]
        self.data = bytearray(b"".join(bytes([number]) * SECTOR for number in range(64)))
        self.flushed = 0
        self.hold = threading.Event()

    def _check(self, offset: int, length: int) -> None:
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            if sector == 7:
                raise OSError(errno.EIO, "bad")
            if sector == 8:
                raise OSError(errno.ENOSPC, "full")
            if sector == 10:
                self.hold.wait(20)

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        return b"short" if offset == 9 * SECTOR else bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushed += 1


def wrapper(cdb: bytes, length: int, inward: bool, tag: int = 5, mark: bytes = b"USBC") -> bytes:
    return mark + struct.pack("<IIBBB", tag, length, 0x80 * inward, 0, len(cdb)) + cdb.ljust(16, b"\0")


def command(engine: Engine, cdb: bytes, length: int = 0, data: bytes | None = None) -> tuple[int, bytes, int]:
    """Do a command as a driver does, and return its status, data and residue."""
    size = length if data is None else len(data)
    assert engine.bulk(OUT, 31, wrapper(cdb, size, data is None and size > 0)) == (0, b"")
    got = b""
    if data:
        assert engine.bulk(OUT, len(data), data)[0] == 0
    elif size:
        moved, got = engine.bulk(IN, size)
        assert moved == 0
    moved, status = engine.bulk(IN, 13)
    mark, tag, left, result = struct.unpack("<4sIIB", status)
    assert (moved, mark, tag) == (0, b"USBS", 5)
    return result, got, left


def sense(engine: Engine) -> tuple[int, int, int]:
    result, data, _ = command(engine, b"\3\0\0\0\x12", 18)
    assert (result, len(data), data[0]) == (0, 18, 0x70)
    return data[2], data[12], data[13]


def read(first: int, count: int) -> bytes:
    return struct.pack(">BBIBH", 0x28, 0, first, 0, count)


def write(first: int, count: int) -> bytes:
    return struct.pack(">BBIBH", 0x2A, 0, first, 0, count)


def test_what_linux_asks() -> None:
    with attached(UsbStorage(Content())) as engine:
        assert engine.control(0xA1, 0xFE, length=1) == (0, b"\0"), "one unit"
        result, data, _ = command(engine, b"\x12\0\0\0\x24", 36)
        assert (result, data[:2], data[8:32]) == (0, b"\0\x80", b"TrivisorStick           ")
        assert command(engine, bytes(6)) == (0, b"", 0)
        assert command(engine, b"\x25", 8)[:2] == (0, struct.pack(">II", 63, SECTOR))
        assert command(engine, b"\x9e\x10" + bytes(11) + b"\x20", 32)[1][:12] == struct.pack(">QI", 63, SECTOR)
        assert command(engine, b"\x1a\0\x3f\0\xc0", 192)[:2] == (0, bytes([23, 0, 0, 0, 8, 18]) + bytes(18))
        assert command(engine, b"\x12\1\x80\0\x24", 36)[1] == b"\0\x80\0\4name"
        assert command(engine, b"\xa0" + bytes(8) + b"\x10", 16)[1] == b"\0\0\0\x08" + bytes(12)
        assert command(engine, read(3, 2), 2 * SECTOR) == (0, b"\3" * SECTOR + b"\4" * SECTOR, 0)
        assert command(engine, struct.pack(">BBQI", 0x88, 0, 63, 1), SECTOR)[1] == bytes([63]) * SECTOR


def test_what_is_written_is_flushed() -> None:
    content = Content()
    with attached(UsbStorage(content)) as engine:
        assert command(engine, write(1, 2), data=b"x" * 1024) == (0, b"", 0)
        assert content.data[SECTOR : 3 * SECTOR] == b"x" * 1024
        assert content.flushed == 1
        assert engine.bulk(OUT, 31, wrapper(write(20, 2), 1024, False)) == (0, b"")
        for _ in range(2):
            assert engine.bulk(OUT, 512, b"y" * 512)[0] == 0, "data comes in as many transfers as the guest likes"
        assert engine.bulk(IN, 13)[1][12] == 0
        assert content.data[20 * SECTOR : 22 * SECTOR] == b"y" * 1024


def test_one_that_is_only_read() -> None:
    content = Content(readonly=True)
    with attached(UsbStorage(content)) as engine:
        assert command(engine, b"\x1a\0\x3f\0\xc0", 192)[1][2] == 0x80
        assert command(engine, write(1, 1), data=bytes(512))[0] == 1
        assert sense(engine) == (7, 0x27, 0)
    assert content.data[512] == 1


@pytest.mark.parametrize(
    ("cdb", "length", "expected"),
    [
        (read(7, 1), SECTOR, (3, 0x11, 0)),
        (read(8, 1), SECTOR, (7, 0x27, 7)),
        (read(9, 1), SECTOR, (3, 0x11, 0)),
        (read(63, 2), 2 * SECTOR, (5, 0x21, 0)),
        (read(0xFFFFFFFF, 0xFFFF), 1 << 20, (5, 0x21, 0)),
        (b"\xde\xad", 0, (5, 0x20, 0)),
        (b"\x1a\0\x01\0\xc0", 192, (5, 0x24, 0)),
        (b"\x12\1\xb0\0\xff", 255, (5, 0x24, 0)),
    ],
)
def test_what_fails_says_why(cdb: bytes, length: int, expected: tuple[int, int, int]) -> None:
    with attached(UsbStorage(Content())) as engine:
        assert command(engine, cdb, length) == (1, b"", length)
        assert sense(engine) == expected
        assert sense(engine) == (0, 0, 0), "it is said once"
        assert command(engine, read(1, 1), SECTOR)[:2] == (0, b"\1" * SECTOR)


def test_writes_that_fail() -> None:
    content = Content()
    with attached(UsbStorage(content)) as engine:
        for first, expected in ((7, (3, 0x0C, 0)), (8, (7, 0x27, 7)), (64, (5, 0x21, 0))):
            assert command(engine, write(first, 1), data=bytes(SECTOR))[0] == 1
            assert sense(engine) == expected
        assert command(engine, b"\xde\xad", data=bytes(5000))[0] == 1, "what it does not take is swallowed"
    assert len(content.faults) == 2


def test_a_disk_that_hangs() -> None:
    """A medium error within the timeout, and what it answers later is nobody's."""
    content = Content(timeout=0.4)
    with attached(UsbStorage(content)) as engine:
        assert command(engine, read(10, 1), SECTOR) == (1, b"", SECTOR)
        engine.patience(20)
        assert sense(engine) == (3, 0x11, 0)
        engine.patience(0.4)
        assert command(engine, write(10, 1), data=bytes(SECTOR))[0] == 1
        engine.patience(20)
        assert sense(engine) == (3, 0x0C, 0)
        assert command(engine, read(1, 1), SECTOR)[:2] == (0, b"\1" * SECTOR)
        content.hold.set()
        assert command(engine, read(2, 1), SECTOR)[:2] == (0, b"\2" * SECTOR)
    assert [type(fault) for fault in content.faults] == [TimeoutError, TimeoutError]


def test_host_and_device_disagree() -> None:
    """Phase errors of the class's text, 6.7: less asked for than read, data the other way, and none."""
    with attached(UsbStorage(Content())) as engine:
        assert command(engine, read(1, 2), SECTOR)[0] == 2
        assert command(engine, read(1, 1))[0] == 2
        assert command(engine, read(1, 1), data=bytes(SECTOR))[0] == 2
        assert command(engine, write(1, 1), SECTOR)[0] == 2
        assert command(engine, write(1, 2), data=bytes(SECTOR))[0] == 2
        assert command(engine, read(1, 1), 2 * SECTOR) == (0, b"\1" * SECTOR, SECTOR)


@pytest.mark.parametrize(
    "garbage", [b"", b"USBC", wrapper(b"\0", 0, False, mark=b"USBX"), wrapper(b"", 0, False), wrapper(b"\0", 0, False) + b"\0", bytes(64)]
)
def test_what_is_no_command(garbage: bytes) -> None:
    """Both pipes are halted until the device is reset."""
    with attached(UsbStorage(Content())) as engine:
        assert engine.bulk(OUT, len(garbage), garbage)[0] == Status.STALL
        assert engine.bulk(IN, 13)[0] == Status.STALL
        assert engine.control(0x82, 0, length=2)[1] in (b"\0\0", b"\1\0")
        assert engine.bulk(OUT, 31, wrapper(bytes(6), 0, False))[0] == Status.STALL
        assert engine.control(0x21, 0xFF, length=0)[0] == 0
        engine.clear_halt(IN)
        assert command(engine, read(1, 1), SECTOR)[:2] == (0, b"\1" * SECTOR)


def test_ejected() -> None:
    stick = UsbStorage(Content())
    with attached(stick) as engine:
        assert command(engine, b"\x1b\0\0\0\2")[0] == 0
        assert command(engine, bytes(6))[0] == 1
        assert sense(engine) == (2, 0x3A, 0)
        assert command(engine, read(1, 1), SECTOR)[0] == 1
        assert stick.ejected
        assert command(engine, b"\x1b\0\0\0\3")[0] == 0
        assert command(engine, bytes(6))[0] == 0


def test_a_new_command_before_the_last_was_read() -> None:
    with attached(UsbStorage(Content())) as engine:
        for _ in range(40):
            assert engine.bulk(OUT, 31, wrapper(read(0, 7), 7 * SECTOR, True))[0] == 0
        assert command(engine, read(2, 1), SECTOR)[:2] == (0, b"\2" * SECTOR)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=40), st.binary(min_size=16, max_size=16).map(lambda cdb: wrapper(cdb, 64, True))), max_size=12)
)
def test_any_bytes(sent: list[bytes]) -> None:
    """Whatever is sent, a reset makes it a stick again, and its functions see ranges of the disk only."""
    content = Content()
    content.hold.set()
    with attached(UsbStorage(content)) as engine:
        for data in sent:
            assert engine.bulk(OUT, len(data), data)[0] in (Status.SUCCESS, Status.STALL)
        assert engine.control(0x21, 0xFF, length=0)[0] == 0
        engine.clear_halt(IN)
        assert command(engine, b"\x1b\0\0\0\3")[0] == 0
        assert command(engine, b"\x25", 8)[1] == struct.pack(">II", 63, SECTOR)
    assert all(isinstance(fault, OSError | ValueError) for fault in content.faults), content.faults


def test_what_is_no_disk() -> None:
    with pytest.raises(InvalidSpec, match="BlockDevice"):
        UsbStorage(bytes(512))  # type: ignore[arg-type]
