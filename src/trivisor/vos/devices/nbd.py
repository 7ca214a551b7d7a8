"""The server's side of NBD (doc/proto.md of the reference implementation), without sockets: bytes in, requests and bytes out.

The fixed newstyle handshake and simple replies are all that there is: one export, whatever the client calls it. The client is an engine
that a guest may have taken: every length, count and offset is bounded, and what breaks the protocol is a ProtocolError, which
ends the connection and nothing else.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from trivisor.vos.devices.serving import ProtocolError

MAX_PAYLOAD = 32 << 20
MAX_OPTION = 4096
MAX_OPTIONS = 32
_GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 1 | 2)
"""Fixed newstyle, and no zeroes after the old way to ask for the export."""
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO = 1, 2, 3, 6, 7
_ACK, _SERVER, _REP_INFO = 1, 2, 3
_UNSUPPORTED, _INVALID = 1 << 31 | 1, 1 << 31 | 3
_FUA = 1

ERRORS = {errno.EPERM: 1, errno.EIO: 5, errno.ENOMEM: 12, errno.EINVAL: 22, errno.ENOSPC: 28, errno.EROFS: 1}
"""Those that the protocol has, and EROFS, which is said as EPERM; every other is EIO."""


class Command(IntEnum):
    """What a request asks for."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4


@dataclass(frozen=True)
class Request:
    """One request, its range within the export. `error` is an errno that it must be answered with, unasked; 0: none."""

    command: Command
    cookie: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    fua: bool = False
    """What is written must be kept before it is answered."""
    error: int = 0

    @property
    def what(self) -> str:
        """What it is, in a word."""
        return self.command.name.lower()

    @property
    def unasked(self) -> bytes | None:
        """The answer to what is not carried out, else None."""
        return reply(self.cookie, self.error) if self.error else None

    def failed(self, error: BaseException) -> bytes:
        """Return the answer to a request whose function raised `error`, or took too long."""
        return reply(
            self.cookie, (error.errno if isinstance(error, OSError) and not isinstance(error, TimeoutError) else None) or errno.EIO
        )


@dataclass(frozen=True)
class Export:
    """What is served. Bytes."""

    size: int
    readonly: bool = False
    block: int = 512

    @property
    def flags(self) -> int:
        """HAS_FLAGS, SEND_FLUSH and SEND_FUA; READ_ONLY or SEND_TRIM."""
        return 1 | 4 | 8 | (2 if self.readonly else 32)


def reply(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    """Return the answer to a request; `error` is an errno, `data` what was read."""
    code = 0 if not error else ERRORS.get(error, 5)
    return struct.pack(">IIQ", _REPLY_MAGIC, code, cookie) + (b"" if code else data)


class Session:
    """One client's connection."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._buffer = bytearray()
        self._out = bytearray(_GREETING)
        self._flags = False
        self._options = 0
        self._transmitting = False
        self.done = False
        """Whether the client has taken its leave."""

    def output(self) -> bytes:
        """Return what is to be sent to the client now, of the handshake."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def feed(self, data: bytes) -> Iterator[Request]:
        """Take what the client sent; yield the requests in it. Raises ProtocolError."""
        self._buffer += data
        while not self._transmitting:
            if not self._handshake():
                return
        while not self.done and (request := self._request()) is not None:
            if request.command is Command.DISCONNECT:
                self.done = True
            else:
                yield request

    def _take(self, size: int) -> bytes | None:
        if len(self._buffer) < size:
            return None
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _handshake(self) -> bool:
        """Take one step. False if there is not enough for it."""
        if not self._flags:
            flags = self._take(4)
            if flags is None:
                return False
            if int.from_bytes(flags, "big") & ~3 or not flags[3] & 1:
                raise ProtocolError(f"flags {flags.hex()} of the handshake")
            self._flags, self._zeroes = True, not flags[3] & 2
            return True
        if len(self._buffer) < _OPTION.size:
            return False
        magic, option, length = _OPTION.unpack_from(self._buffer)
        if magic != b"IHAVEOPT" or length > MAX_OPTION:
            raise ProtocolError("what is no option")
        if len(self._buffer) < _OPTION.size + length:
            return False
        data = bytes(self._buffer[_OPTION.size : _OPTION.size + length])
        del self._buffer[: _OPTION.size + length]
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise ProtocolError("options without end")
        self._option(option, data)
        return True

    def _option(self, option: int, data: bytes) -> None:
        if option == _EXPORT_NAME:
            self._out += struct.pack(">QH", self._export.size, self._export.flags) + (bytes(124) if self._zeroes else b"")
            self._transmitting = True
        elif option == _ABORT:
            self._answer(option, _ACK)
            raise ProtocolError("the client gave up")
        elif option == _LIST:
            self._answer(option, _SERVER, struct.pack(">I", 0))
            self._answer(option, _ACK)
        elif option in (_INFO, _GO):
            if len(data) < 6 or int.from_bytes(data[:4], "big") > len(data) - 6:
                self._answer(option, _INVALID)
                return
            self._answer(option, _REP_INFO, struct.pack(">HQH", 0, self._export.size, self._export.flags))
            self._answer(option, _REP_INFO, struct.pack(">HIII", 3, self._export.block, 4096, MAX_PAYLOAD))
            self._answer(option, _ACK)
            self._transmitting = option == _GO
        else:
            self._answer(option, _UNSUPPORTED)

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self._out += _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data

    def _request(self) -> Request | None:
        if len(self._buffer) < _REQUEST.size:
            return None
        magic, flags, kind, cookie, offset, length = _REQUEST.unpack_from(self._buffer)
        if magic != _REQUEST_MAGIC:
            raise ProtocolError("what is no request")
        payload = length if kind == Command.WRITE else 0
        if payload > MAX_PAYLOAD:
            raise ProtocolError(f"a write of {length} bytes")
        if len(self._buffer) < _REQUEST.size + payload:
            return None
        data = bytes(self._buffer[_REQUEST.size : _REQUEST.size + payload])
        del self._buffer[: _REQUEST.size + payload]
        if kind not in list(Command):
            return Request(Command.FLUSH, cookie, error=errno.EINVAL)
        return Request(Command(kind), cookie, offset, length, data, bool(flags & _FUA), self._wrong(kind, flags, offset, length))

    def _wrong(self, kind: int, flags: int, offset: int, length: int) -> int:
        """Return the errno of a request that is not carried out, else 0."""
        if kind in (Command.FLUSH, Command.DISCONNECT):
            return 0
        if flags & ~_FUA or (kind == Command.READ and length > MAX_PAYLOAD) or not length:
            return errno.EINVAL
        if kind != Command.READ and self._export.readonly:
            return errno.EPERM
        if offset + length > self._export.size:
            return errno.ENOSPC if kind == Command.WRITE else errno.EINVAL
        return 0
