"""Frames and payloads of the line (guest/PROTOCOL.md): pure functions, no sockets.

The constants are those of guest/src/frame.h; a test compares them. Whatever is decoded here came from a guest, so
every decoder checks every field and raises GuestProtocolError for what it does not know.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from trivisor.core.errors import GuestProtocolError, InvalidSpec

MAGIC: Final = 0x54
HEADER: Final = 12
FRAME_MAX: Final = 32768
RESYNC: Final = HEADER + FRAME_MAX
VERSION: Final = 1
NONCE_SIZE: Final = 16
WINDOW: Final = 256 * 1024
"""Bytes of DATA that may be in flight on one channel."""
EXEC_MAX: Final = 1 << 20
"""Bytes of one EXEC request."""
DATA_MAX: Final = FRAME_MAX - HEADER - 1
"""Bytes in one DATA frame: with its head exactly what virtio_console copies at once, a little less than would be legal."""
STREAMS: Final = 65535

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
TRACE: Final = 3


class Type(IntEnum):
    """Frame types."""

    SYNC = 0x01
    SYNCED = 0x02
    GONE = 0x03
    LOG = 0x06
    BYE = 0x07
    SHUTDOWN = 0x08
    STEPS = 0x09
    OK = 0x0A
    ERROR = 0x0B
    PING = 0x0C
    PONG = 0x0D
    EXEC = 0x10
    STARTED = 0x11
    EXITED = 0x12
    DATA = 0x13
    WINDOW = 0x14
    SIGNAL = 0x15
    RESIZE = 0x16
    KEEPER = 0x40
    KEEPER_INFO = 0x41
    KEEPER_KILL = 0x42
    KEEPER_STOP = 0x43


class Flag(IntEnum):
    """Flags of an EXEC request."""

    PTY = 1
    BUILTIN = 2
    DETACH = 4
    NO_STDIN = 8
    POLICY = 16
    """Set by `exec_request` where a policy is given."""
    PROGRAM = 32
    """Set by `exec_request` where a stop signal is given."""


_HEADER = struct.Struct("<BBHII")
_DATA_HEAD = struct.Struct("<BBHIIB")
_EXITED = struct.Struct("<BIQQQ")
_WINDOW = struct.Struct("<BI")
_STAT = struct.Struct("<IQIIQ")
_U32 = struct.Struct("<I")
MAX_ERRNO: Final = 4095
MAX_SIGNAL: Final = 64


# -- frames ---------------------------------------------------------------------------------------


def header(kind: int, stream: int, length: int) -> bytes:
    """Return the 12 bytes that go before a payload of `length`."""
    return _HEADER.pack(MAGIC, kind, 0, length, stream)


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one whole frame."""
    if len(payload) > FRAME_MAX:
        raise ValueError(f"a payload of {len(payload)} bytes is more than a frame holds")
    return header(kind, stream, len(payload)) + payload


def data_head(stream: int, channel: int, size: int) -> bytes:
    """Return what goes before `size` bytes of DATA: the header and the channel."""
    return _DATA_HEAD.pack(MAGIC, Type.DATA, 0, size + 1, stream, channel)


def window(stream: int, channel: int, more: int) -> bytes:
    """Return a WINDOW frame."""
    return frame(Type.WINDOW, stream, _WINDOW.pack(channel, more))


class Parser:
    """Collects bytes until frames are whole, in one buffer that never grows.

    `space()` is where to receive; `frames(n)` gives the frames that the n bytes just received completed. A payload is
    a view of the buffer, valid until the next `space()`.
    """

    def __init__(self, size: int = 8 * RESYNC) -> None:
        self._view = memoryview(bytearray(max(size, RESYNC)))
        self._start = self._end = 0

    def space(self) -> memoryview:
        """Return the free part of the buffer, never empty once all frames were taken."""
        held = self._end - self._start
        if held == 0:
            self._start = self._end = 0
        elif len(self._view) - self._start < RESYNC:
            self._view[:held] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, held
        return self._view[self._end :]

    def frames(self, received: int) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (type, stream, payload). Raises GuestProtocolError at a malformed header; the line is lost then."""
        view = self._view
        self._end += received
        while (at := self._start) < (end := self._end):
            if view[at] != MAGIC:
                if view[at]:
                    raise GuestProtocolError(f"a frame begins with {view[at]:#04x}")
                self._start += _zeros(view[at:end])
                continue
            if end - at < HEADER:
                return
            _, kind, zero, length, stream = _HEADER.unpack_from(view, at)
            if zero or length > FRAME_MAX:
                raise GuestProtocolError(f"a malformed frame header: {bytes(view[at : at + HEADER]).hex()}")
            last = at + HEADER + length
            if last > end:
                return
            self._start = last
            yield kind, stream, view[at + HEADER : last]


def _zeros(view: memoryview) -> int:
    """Return how many zero bytes `view` begins with."""
    data = bytes(view)
    return len(data) - len(data.lstrip(b"\0"))


# -- payloads -------------------------------------------------------------------------------------


class Reader:
    """Reads fields off a payload. Running past its end raises GuestProtocolError."""

    def __init__(self, payload: bytes | memoryview) -> None:
        self._payload = memoryview(payload)
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._payload) - self._at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise GuestProtocolError(f"a payload ends {size - self.left} bytes early")
        self._at += size
        return self._payload[self._at - size : self._at]

    def u8(self) -> int:
        return self.take(1)[0]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> bytes:
        value = bytes(self.take(self.u32()))
        if b"\0" in value:
            raise GuestProtocolError("a string holds a NUL")
        return value

    def done(self) -> None:
        """Raise GuestProtocolError if anything is left."""
        if self.left:
            raise GuestProtocolError(f"a payload has {self.left} bytes too many")


def text(value: bytes) -> str:
    """Return a name from a guest as Python holds file names (surrogateescape, PEP 383)."""
    return value.decode("utf-8", "surrogateescape")


def raw(value: str | bytes) -> bytes:
    """Return `value` as the guest gets it. Raises InvalidSpec for a NUL, which no string of the line holds."""
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)
    if b"\0" in data:
        raise InvalidSpec(f"{value!r} holds a NUL")
    return data


def string(value: str | bytes) -> bytes:
    data = raw(value)
    return _U32.pack(len(data)) + data


def strings(values: Iterable[str | bytes]) -> bytes:
    packed = [string(value) for value in values]
    return _U32.pack(len(packed)) + b"".join(packed)


def steps(items: Sequence[Sequence[str]]) -> bytes:
    """Return the payload of STEPS."""
    return _U32.pack(len(items)) + b"".join(strings(item) for item in items)


def exec_request(
    argv: Sequence[str | bytes],
    env: Sequence[str | bytes],
    *,
    flags: int = 0,
    size: tuple[int, int] = (0, 0),
    user: str = "",
    cwd: str = "",
    policy: Sequence[Sequence[str]] | None = None,
    stop: int | None = None,
) -> bytes:
    """Return an EXEC request; `policy`: the operations that its policy is made of; `stop`: the stop signal of the machine's program.

    Raises InvalidSpec if it is over 1 MiB.
    """
    flags |= (0 if policy is None else Flag.POLICY) | (0 if stop is None else Flag.PROGRAM)
    request = struct.pack("<IHH", flags, *size) + string(user) + string(cwd) + strings(argv) + strings(env)
    request += (b"" if policy is None else steps(policy)) + (b"" if stop is None else _U32.pack(stop))
    if len(request) > EXEC_MAX:
        raise InvalidSpec(
            f"the arguments and environment of a command take {len(request)} bytes, at most {EXEC_MAX} go",
            hint="give what is long on stdin, or in a file",
        )
    return request


def exec_frames(stream: int, request: bytes) -> list[bytes]:
    """Return `request` cut into EXEC frames."""
    cuts = range(0, len(request), DATA_MAX)
    return [frame(Type.EXEC, stream, bytes([at + DATA_MAX < len(request)]) + request[at : at + DATA_MAX]) for at in cuts]


@dataclass(frozen=True)
class Exited:
    """How a command ended. `signal` is None if it exited by itself with `status`. Times in seconds, peak in bytes."""

    status: int
    signal: int | None
    user_seconds: float
    system_seconds: float
    peak_memory: int

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + n for a command that signal n killed."""
        return self.status if self.signal is None else 128 + self.signal


def parse_exited(payload: memoryview) -> Exited:
    if len(payload) != _EXITED.size:
        raise GuestProtocolError(f"EXITED has {len(payload)} bytes")
    how, value, user, system, peak = _EXITED.unpack(payload)
    if how == 0 and value <= 255:
        return Exited(value, None, user / 1e6, system / 1e6, peak * 1024)
    if how == 1 and 1 <= value <= MAX_SIGNAL:
        return Exited(0, value, user / 1e6, system / 1e6, peak * 1024)
    raise GuestProtocolError(f"EXITED says how={how} value={value}")


def parse_started(payload: memoryview) -> int:
    reader = Reader(payload)
    pid = reader.u32()
    reader.done()
    return pid


def parse_error(payload: memoryview) -> tuple[int, str]:
    """Return (errno, message)."""
    reader = Reader(payload)
    code, message = reader.u32(), reader.string()
    reader.done()
    if not 0 < code <= MAX_ERRNO:
        raise GuestProtocolError(f"ERROR says errno {code}")
    return code, message.decode("utf-8", "replace")


def parse_window(payload: memoryview) -> tuple[int, int]:
    """Return (channel, bytes more)."""
    if len(payload) != _WINDOW.size:
        raise GuestProtocolError(f"WINDOW has {len(payload)} bytes")
    channel, more = _WINDOW.unpack(payload)
    return channel, more


@dataclass(frozen=True)
class Stat:
    """A stat record. `mode` is st_mode, `mtime` nanoseconds since the epoch."""

    mode: int
    size: int
    uid: int
    gid: int
    mtime: int
    target: bytes


def parse_stat(reader: Reader) -> Stat:
    mode, size, uid, gid, mtime = _STAT.unpack(reader.take(_STAT.size))
    return Stat(mode, size, uid, gid, mtime, reader.string())
