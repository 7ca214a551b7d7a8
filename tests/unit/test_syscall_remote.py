"""The host's end of a virtual machine's answerer, against one that is hostile: it ends, and nothing else happens."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import BadArgument, CallGone, GuestError, GuestGone
from trivisor.vos.process import Process
from trivisor.vos.processes import Processes
from trivisor.vos.syscalls.behalf import opening
from trivisor.vos.syscalls.listener import NOTIFICATION
from trivisor.vos.syscalls.remote import RemoteListener, read_ahead

NOTE = (77, 5, 0, 257, 0xC000003E, 0, 100, 200, 0, 0, 0, 0)


def message(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<IB", len(body) + 1, kind[0]) + body


def notified(*ahead: tuple[int, bytes]) -> bytes:
    parts = b"".join(struct.pack("<BI", argument, len(data)) + data for argument, data in ahead)
    return message(b"n", NOTIFICATION.pack(*NOTE) + bytes([len(ahead)]) + parts)


class Guest:
    """A builtin `answer` of the test's: what it says goes to the listener, what it hears is kept."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.heard = b""
        write, end = (lambda data, timeout: theirs.sendall(data)), (lambda: theirs.shutdown(socket.SHUT_WR))
        stdin = SimpleNamespace(write=write, close=end, closed=False)
        stdout = SimpleNamespace(read=theirs.recv)
        kill = lambda: theirs.shutdown(socket.SHUT_RDWR)  # noqa: E731
        self.process = cast(Process, SimpleNamespace(stdin=stdin, stdout=stdout, poll=lambda: 2, wait=lambda timeout: 2, close=kill))
        self.theirs = theirs

    def listener(self) -> RemoteListener:
        return RemoteListener(self.process, cast(Processes, SimpleNamespace(machine="test")), read_ahead(["openat"], "x86_64"))

    def hear(self) -> tuple[bytes, bytes]:
        """Take one message of the listener's."""
        while len(self.heard) < 4 or len(self.heard) < 4 + int.from_bytes(self.heard[:4], "little"):
            part = self.ours.recv(65536)
            assert part
            self.heard += part
        size = 4 + int.from_bytes(self.heard[:4], "little")
        whole, self.heard = self.heard[4:size], self.heard[size:]
        return whole[:1], whole[1:]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def guest() -> Any:
    made = Guest()
    made.ours.settimeout(30)
    yield made
    made.close()


@pytest.fixture
def listener(guest: Guest) -> Any:
    guest.ours.sendall(message(b"o"))
    made = guest.listener()
    assert guest.hear() == (b"t", read_ahead(["openat"], "x86_64"))
    yield made
    made.close()


def received(listener: RemoteListener) -> tuple[int, ...]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        note = listener.receive()
        if note is not None:
            return note
        time.sleep(0.001)
    raise TimeoutError


def test_what_came_ahead_is_not_asked_for(guest: Guest, listener: RemoteListener) -> None:
    guest.ours.sendall(notified((1, b"/some/path")))
    note = received(listener)
    assert note == NOTE
    assert listener.string(note, 200, 4096) == b"/some/path"
    assert listener.read(note, 200, 4) == b"/som"
    assert listener.answer(note, 0, errno.EACCES, 0)
    assert guest.hear() == (b"d", struct.pack("<QqiI", 77, 0, -errno.EACCES, 0))


def test_requests_and_their_replies(guest: Guest, listener: RemoteListener) -> None:
    replies = [(0, b"abc\0de"), (errno.EFAULT, b""), (errno.ENOENT, b""), (0, b""), (errno.ENOENT, b"")]
    heard: list[bytes] = []

    def answer() -> None:
        for code, data in replies:
            kind, body = guest.hear()
            heard.append(kind)
            guest.ours.sendall(message(b"R", body[:4] + struct.pack("<i", code) + data))

    thread = threading.Thread(target=answer)
    thread.start()
    assert listener.string(NOTE, 300, 4096) == b"abc"
    with pytest.raises(BadArgument):
        listener.read(NOTE, 300, 10)
    with pytest.raises(CallGone):
        listener.write(NOTE, 300, b"x")
    assert listener.valid(NOTE)
    assert not listener.valid(NOTE)
    thread.join()
    assert heard == [b"r", b"r", b"w", b"v", b"v"]


def test_an_open_on_behalf_that_fails_answers_the_call(guest: Guest, listener: RemoteListener) -> None:
    listener.behalf(opening(NOTE, -100, b"/x", 0, 0, 0, False))
    kind, body = guest.hear()
    assert kind == b"p" and body.endswith(b"/x") and listener.held == {77}
    guest.ours.sendall(message(b"R", body[:4] + struct.pack("<i", errno.ENOENT)))
    assert guest.hear() == (b"d", struct.pack("<QqiI", 77, 0, -errno.ENOENT, 0))
    assert not listener.held


def test_a_socket_is_carried(guest: Guest, listener: RemoteListener) -> None:
    ours, theirs = socket.socketpair()
    numbers: list[int] = []
    thread = threading.Thread(target=lambda: numbers.append(listener.give(NOTE, theirs.fileno(), 9, True, send=False)))
    thread.start()
    kind, body = guest.hear()
    assert (kind, body[4:]) == (b"F", struct.pack("<QBII", 77, 2, 9, os.O_CLOEXEC))
    channel = body[:4]
    guest.ours.sendall(message(b"R", channel + struct.pack("<ii", 0, 9)))
    thread.join()
    theirs.close()
    assert numbers == [9]
    with ours:
        ours.settimeout(30)
        ours.sendall(b"to the program")
        assert guest.hear() == (b"s", channel + b"to the program")
        guest.ours.sendall(message(b"s", channel + b"from it") + message(b"e", channel))
        assert ours.recv(100) == b"from it"
        assert ours.recv(100) == b""


@pytest.fixture
def giving(guest: Guest, listener: RemoteListener) -> Any:
    """Ours, theirs, and the channel that a call is being given; ours had something to say, and nothing more, before that."""
    ours, theirs = socket.socketpair()
    ours.sendall(b"said before")
    ours.shutdown(socket.SHUT_WR)
    failures: list[OSError] = []

    def give() -> None:
        try:
            listener.give(NOTE, theirs.fileno(), 9, True, send=False)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=give)
    thread.start()
    kind, body = guest.hear()
    assert kind == b"F"
    guest.ours.settimeout(0.2)
    with pytest.raises(TimeoutError):  # the machine knows of no channel yet: what it hears of one would be lost
        guest.hear()
    guest.ours.settimeout(30)
    yield ours, theirs, body[:4], thread, failures
    thread.join()
    ours.close()
    theirs.close()


def test_a_channel_is_made_before_it_carries(guest: Guest, giving: Any) -> None:
    ours, theirs, channel, thread, _ = giving
    # What the program says at once is not lost, either, though we hear of it with the reply.
    guest.ours.sendall(message(b"R", channel + struct.pack("<ii", 0, 9)) + message(b"s", channel + b"at once") + message(b"e", channel))
    thread.join()
    theirs.close()
    assert guest.hear() == (b"s", channel + b"said before")
    assert guest.hear() == (b"e", channel)
    ours.settimeout(30)
    assert ours.recv(100) == b"at once"
    assert ours.recv(100) == b""


def test_what_was_written_before_the_end_is_delivered(guest: Guest, listener: RemoteListener, giving: Any) -> None:
    """More than a socket holds, to one who reads only later."""
    ours, theirs, channel, thread, _ = giving
    said = os.urandom(1 << 20)
    pieces = [message(b"s", channel + said[at : at + 65536]) for at in range(0, len(said), 65536)]
    guest.ours.sendall(message(b"R", channel + struct.pack("<ii", 0, 9)) + b"".join(pieces))
    # What nobody has read when the channel ends is told to who wrote it, as an error.
    assert (guest.hear(), guest.hear()) == ((b"s", channel + b"said before"), (b"e", channel))
    guest.ours.sendall(message(b"x", bytes(4)))
    thread.join()
    theirs.close()
    listener._carrier.join()
    ours.settimeout(30)
    got = b""
    while part := ours.recv(65536):
        got += part
    assert got == said


def test_what_could_not_be_given_is_left_as_it_was(guest: Guest, giving: Any) -> None:
    ours, theirs, channel, thread, failures = giving
    guest.ours.sendall(message(b"R", channel + struct.pack("<i", errno.EMFILE)) + message(b"e", channel) + message(b"e", channel))
    thread.join()
    assert [error.errno for error in failures] == [errno.EMFILE]
    theirs.settimeout(30)
    assert theirs.recv(100) == b"said before"
    theirs.sendall(b"still open")
    assert ours.recv(100) == b"still open"
    guest.ours.settimeout(0.2)
    with pytest.raises(TimeoutError):
        guest.hear()


def test_not_attached(guest: Guest) -> None:
    guest.ours.shutdown(socket.SHUT_WR)
    with pytest.raises(GuestError, match="No such file"):
        guest.listener()


@pytest.mark.fuzz
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(
    st.binary(max_size=40),
    st.builds(message, st.sampled_from([b"n", b"R", b"b", b"s", b"e", b"o", b"z"]), st.binary(max_size=120)),
    st.just(notified((1, b"x"), (9, b"y"))),
), max_size=8))  # fmt: skip
def test_garbage_ends_it(parts: list[bytes]) -> None:
    guest = Guest()
    listener: RemoteListener | None = None
    try:
        guest.ours.sendall(message(b"o") + b"".join(parts))
        guest.ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(GuestError):
            listener = guest.listener()
        if listener is not None:
            with contextlib.suppress(GuestGone):
                for _ in range(20):
                    note = listener.receive()
                    if note is not None:
                        listener.answer(note, 0, 1, 0)
            listener._carrier._reader.join(30)
            assert not listener._carrier._reader.is_alive()
            with pytest.raises(GuestGone):
                for _ in range(20):
                    listener.receive()
    finally:
        if listener is not None:
            listener.close()
        guest.close()
