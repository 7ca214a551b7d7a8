"""The line protocol by hand, for tests of the guest program itself: frames over a socket, nothing more.

Deliberately not built on trivisor.vos: a mistake that client and guest have in common would hide here.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SYNC, SYNCED, GONE, LOG, BYE, SHUTDOWN, STEPS, OK, ERROR, PING, PONG = 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13
EXEC, STARTED, EXITED, DATA, WINDOW, SIGNAL, RESIZE = 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16
PTY, BUILTIN, DETACH, NO_STDIN = 1, 2, 4, 8
FRAME_MAX = 32768
WINDOW_SIZE = 262144
RESYNC = 12 + FRAME_MAX


def string(s: str | bytes) -> bytes:
    b = s.encode() if isinstance(s, str) else s
    return struct.pack("<I", len(b)) + b


def strings(items: Iterable[str | bytes]) -> bytes:
    packed = [string(s) for s in items]
    return struct.pack("<I", len(packed)) + b"".join(packed)


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack("<BBHII", 0x54, kind, 0, len(payload), stream) + payload


def exec_request(
    argv: Sequence[str | bytes],
    *,
    flags: int = 0,
    rows: int = 24,
    columns: int = 80,
    user: str = "",
    cwd: str = "/",
    env: Mapping[str, str] | None = None,
) -> bytes:
    pairs = [f"{k}={v}" for k, v in (env or {}).items()]
    return struct.pack("<IHH", flags, rows, columns) + string(user) + string(cwd) + strings(argv) + strings(pairs)


@dataclass
class Result:
    """How a command went. `how` is exit or signal with `value`, or error with the errno and `text`."""

    how: str = ""
    value: int = -1
    text: str = ""
    pid: int = 0
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    usage: tuple[int, int, int] = (0, 0, 0)


class RawLine:
    """One end of the line. Every wait is bounded by `timeout` seconds."""

    def __init__(self, sock: socket.socket, timeout: float = 60.0) -> None:
        self.sock = sock
        self.timeout = timeout
        self.buffer = bytearray()
        self.next_stream = 0x10001
        self.logs: list[bytes] = []
        sock.settimeout(timeout)

    def send(self, kind: int, stream: int, payload: bytes = b"") -> None:
        self.sock.sendall(frame(kind, stream, payload))

    def receive(self) -> tuple[int, int, bytes]:
        """The next frame: type, stream, payload. EOFError when the other end has closed."""
        while True:
            if len(self.buffer) >= 12:
                magic, kind, zero, size, stream = struct.unpack_from("<BBHII", self.buffer)
                if magic != 0x54 or zero or size > FRAME_MAX:
                    raise ValueError(f"malformed frame {bytes(self.buffer[:12]).hex()}")
                if len(self.buffer) >= 12 + size:
                    payload = bytes(self.buffer[12 : 12 + size])
                    del self.buffer[: 12 + size]
                    if kind == LOG:
                        self.logs.append(payload)
                        continue
                    return kind, stream, payload
            got = self.sock.recv(1 << 18)
            if not got:
                raise EOFError
            self.buffer += got

    def sync(self) -> None:
        """Begin anew, as a keeper does: zeros, SYNC, and all thrown away until the nonce comes back."""
        nonce = os.urandom(16)
        self.sock.sendall(bytes(RESYNC) + frame(SYNC, 0, nonce + struct.pack("<I", 1)))
        want = frame(SYNCED, 0, nonce + struct.pack("<I", 1))
        end = time.monotonic() + self.timeout
        while (at := self.buffer.find(want)) < 0:
            if time.monotonic() > end:
                raise TimeoutError("no SYNCED")
            got = self.sock.recv(1 << 18)
            if not got:
                raise EOFError
            self.buffer += got
        del self.buffer[: at + len(want)]

    def stream(self) -> int:
        self.next_stream += 1
        return self.next_stream

    def start(self, request: bytes, stream: int | None = None) -> int:
        """Send an EXEC request, in as many frames as it takes; its stream."""
        stream = stream or self.stream()
        parts = [request[i : i + FRAME_MAX - 1] for i in range(0, len(request), FRAME_MAX - 1)]
        for i, part in enumerate(parts):
            self.send(EXEC, stream, bytes([i < len(parts) - 1]) + part)
        return stream

    def data(self, stream: int, data: bytes = b"") -> None:
        """stdin of a command; no bytes are its end."""
        self.send(DATA, stream, b"\0" + data)

    def finish(self, stream: int, stdin: bytes | None = b"", on_data: object = None) -> Result:
        """Feed stdin (None: leave it open) within the window and collect until the command's end."""
        result, view, credit, at = Result(), memoryview(stdin or b""), WINDOW_SIZE, 0
        ended = stdin is None
        while True:
            while not ended and (credit > 0 or at == len(view)):
                if at == len(view):
                    self.data(stream)
                    ended = True
                    break
                part = view[at : at + min(credit, 32755)]
                self.data(stream, bytes(part))
                at += len(part)
                credit -= len(part)
            kind, on, payload = self.receive()
            if on != stream:
                continue
            if kind == WINDOW:
                credit += struct.unpack("<BI", payload)[1]
            elif kind == STARTED:
                result.pid = struct.unpack("<I", payload)[0]
            elif kind == DATA:
                (result.stdout if payload[0] == 1 else result.stderr).extend(payload[1:])
                if len(payload) > 1:
                    self.send(WINDOW, stream, struct.pack("<BI", payload[0], len(payload) - 1))
            elif kind == ERROR:
                result.how, result.value = "error", struct.unpack_from("<I", payload)[0]
                result.text = payload[8:].decode()
                return result
            elif kind == EXITED:
                how, result.value, *usage = struct.unpack("<BIQQQ", payload)
                result.how = "signal" if how else "exit"
                result.usage = (usage[0], usage[1], usage[2])
                return result

    def run(self, argv: Sequence[str | bytes], stdin: bytes | None = b"", **options: object) -> Result:
        return self.finish(self.start(exec_request(argv, **options)), stdin)  # type: ignore[arg-type]

    def steps(self, *steps: Sequence[str]) -> Result:
        stream = self.stream()
        self.send(STEPS, stream, struct.pack("<I", len(steps)) + b"".join(strings(s) for s in steps))
        while True:
            kind, on, payload = self.receive()
            if on == stream and kind == OK:
                return Result("exit", 0)
            if on == stream and kind == ERROR:
                return Result("error", struct.unpack_from("<I", payload)[0], payload[8:].decode())
