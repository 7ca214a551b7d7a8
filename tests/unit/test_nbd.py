"""The NBD server: its protocol against any bytes, and functions that raise, hang or answer garbage, over a real socket."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import InvalidSpec
from trivisor.vos.devices import nbd
from trivisor.vos.devices.block import BlockDevice
from trivisor.vos.devices.nbd import Command, Export, Session
from trivisor.vos.devices.serving import ProtocolError, Server

SIZE = 1 << 20
GO = b"\0\0\0\1" + struct.pack(">8sII", b"IHAVEOPT", 7, 6) + bytes(6)
_REPLY = struct.Struct(">IIQ")


def request(kind: int, offset: int = 0, length: int = 0, data: bytes = b"", *, cookie: int = 1, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data


class Memory(BlockDevice):
    """A disk in memory, whose functions do what a test says instead."""

    def __init__(self, **given: object) -> None:
        super().__init__(SIZE, **given)  # type: ignore[arg-type]
        self.data = bytearray(SIZE)
        self.instead: Callable[[int, int], object] | None = None
        self.trimmed: list[tuple[int, int]] = []
        self.flushed = 0

    def read(self, offset: int, length: int) -> bytes:
        if self.instead is not None:
            return self.instead(offset, length)  # type: ignore[return-value]
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushed += 1

    def trim(self, offset: int, length: int) -> None:
        self.trimmed.append((offset, length))


class Client:
    """The other end of an attached disk, past its handshake."""

    def __init__(self, sock: socket.socket, server: Server[Any]) -> None:
        self.socket, self.server = sock, server
        sock.settimeout(30)
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        sock.sendall(GO)
        replies = self.take(20 + 12 + 20 + 14 + 20)
        assert struct.unpack_from(">HQ", replies, 20) == (0, SIZE)

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def answer(self, length: int = 0) -> tuple[int, int, bytes]:
        magic, code, cookie = _REPLY.unpack(self.take(16))
        assert magic == 0x67446698
        return code, cookie, self.take(length) if not code else b""

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        self.socket.sendall(request(kind, offset, length, data, flags=flags))
        code, _, read = self.answer(length if kind == Command.READ else 0)
        return code, read


@contextmanager
def served(device: BlockDevice) -> Iterator[Client]:
    ours, theirs = socket.socketpair()
    server = device.serve(ours)
    with theirs:
        yield Client(theirs, server)
    server.close()
    assert not server.open


def test_read_write_flush_trim() -> None:
    disk = Memory()
    with served(disk) as client:
        assert client.ask(Command.WRITE, 512, 512, b"a" * 512) == (0, b"")
        assert client.ask(Command.READ, 0, 1536) == (0, bytes(512) + b"a" * 512 + bytes(512))
        assert client.ask(Command.FLUSH) == (0, b"")
        assert client.ask(Command.WRITE, 0, 512, b"b" * 512, flags=1) == (0, b""), "FUA"
        assert client.ask(Command.TRIM, 4096, 8192) == (0, b"")
    assert disk.flushed == 2
    assert disk.trimmed == [(4096, 8192)]
    assert not disk.faults


def test_what_lies_outside_is_refused_unasked() -> None:
    disk = Memory()
    disk.instead = lambda offset, length: pytest.fail("it was asked")
    with served(disk) as client:
        assert client.ask(Command.READ, SIZE - 512, 1024)[0] == 22
        assert client.ask(Command.READ, (1 << 64) - 512, 512)[0] == 22
        assert client.ask(Command.WRITE, SIZE, 512, bytes(512))[0] == 28
        assert client.ask(Command.READ, 0, nbd.MAX_PAYLOAD + 1)[0] == 22
        assert client.ask(9)[0] == 22
    with served(Memory(readonly=True)) as client:
        assert client.ask(Command.WRITE, 0, 512, bytes(512))[0] == 1
        assert client.ask(Command.TRIM, 0, 512)[0] == 1


def test_what_a_function_raises_or_returns() -> None:
    disk = Memory()

    def raises(error: Exception) -> Callable[[int, int], object]:
        def instead(offset: int, length: int) -> object:
            raise error

        return instead

    with served(disk) as client:
        cases = [(raises(KeyError("x")), 5), (raises(OSError(errno.ENOSPC, "full")), 28), (raises(OSError("what")), 5)]
        cases += [(lambda o, n: b"short", 5), (lambda o, n: None, 5), (lambda o, n: "a" * n, 5), (lambda o, n: bytes(n + 1), 5)]
        for instead, code in cases:
            disk.instead = instead
            assert client.ask(Command.READ, 0, 512)[0] == code
        disk.instead = None
        assert client.ask(Command.READ, 0, 512) == (0, bytes(512)), "it goes on"
    assert len(disk.faults) == len(cases)


def test_a_function_that_hangs() -> None:
    """Its request fails, the next is answered; what it answers at last is dropped."""
    disk, release = Memory(timeout=0.1), threading.Event()
    disk.instead = lambda offset, length: bytes(length) if release.wait(20) else b""
    with served(disk) as client:
        assert client.ask(Command.READ, 0, 512)[0] == 5
        client.server._timeout = 20  # none of those that do not hang is to be late
        disk.instead = None
        assert client.ask(Command.READ, 512, 512) == (0, bytes(512))
        release.set()
        assert client.ask(Command.READ, 1024, 512) == (0, bytes(512))
    assert isinstance(disk.faults[0], TimeoutError)


def test_one_that_always_hangs_takes_few_threads() -> None:
    disk, release = Memory(timeout=0.02), threading.Event()
    disk.instead = lambda offset, length: bytes(length) if release.wait(20) else b""
    before = threading.active_count()
    with served(disk) as client:
        client.socket.sendall(b"".join(request(Command.READ, 0, 512, cookie=number) for number in range(200)))
        assert {client.answer(512)[:2] for _ in range(200)} == {(5, number) for number in range(200)}
        assert threading.active_count() - before < 15
        disk.instead = None
        release.set()
        for _ in range(1000):  # until a thread has come back
            if client.ask(Command.READ, 0, 512)[0] == 0:
                break
        else:
            pytest.fail("it never answered again")


def test_a_flood_is_answered_in_order_and_bounded() -> None:
    disk = Memory()
    with served(disk) as client:
        sender = threading.Thread(
            target=client.socket.sendall, args=(b"".join(request(Command.READ, 0, 512, cookie=n) for n in range(5000)),), daemon=True
        )
        sender.start()
        assert [client.answer(512)[1] for _ in range(5000)] == list(range(5000))
        sender.join()


def test_who_talks_nonsense_is_hung_up_on() -> None:
    disk = Memory()
    with served(disk) as client:
        client.socket.sendall(bytes(28))
        with pytest.raises(EOFError):
            client.take(1)
    assert isinstance(disk.faults[-1], ProtocolError)


@pytest.mark.parametrize("size", [0, -512, 100, True, "1G", 1 << 63])
def test_sizes_that_no_disk_has(size: object) -> None:
    with pytest.raises(InvalidSpec):
        BlockDevice(size)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=20), st.booleans())
def test_any_bytes(pieces: list[bytes], past_handshake: bool) -> None:
    """Whatever comes, in whatever pieces: requests within the export, or a ProtocolError; what is kept is bounded."""
    session = Session(Export(SIZE))
    try:
        for piece in ([GO] if past_handshake else []) + pieces:
            for found in session.feed(piece):
                assert found.error or found.command in (Command.FLUSH, Command.DISCONNECT) or found.offset + found.length <= SIZE
            session.output()
    except ProtocolError:
        pass
    assert len(session._buffer) <= nbd.MAX_PAYLOAD + nbd.MAX_OPTION


_KINDS = st.sampled_from([0, 1, 3, 4, 5])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_KINDS, st.integers(0, 2 * SIZE), st.integers(0, 3000), st.integers(0, 3)), max_size=8), st.integers(1, 50))
def test_any_requests_in_any_pieces(asked: list[tuple[int, int, int, int]], piece: int) -> None:
    """What was sent comes out in its order, however it is cut up."""
    data = GO + b"".join(
        request(kind, offset, length, bytes(length if kind == 1 else 0), cookie=number, flags=flags)
        for number, (kind, offset, length, flags) in enumerate(asked)
    )
    session = Session(Export(SIZE))
    found = [one for start in range(0, len(data), piece) for one in session.feed(data[start : start + piece])]
    assert [one.cookie for one in found] == list(range(len(asked)))
    for one, (kind, offset, length, flags) in zip(found, asked, strict=True):
        if not one.error and kind in (0, 1, 4):
            assert (one.command, one.offset, one.length, one.fua) == (kind, offset, length, flags == 1)
            assert length > 0 and offset + length <= SIZE
