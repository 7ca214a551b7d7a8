"""A guest that lies: each lie is one error of the right type, in bounded time and memory."""

from __future__ import annotations

import struct
import threading

import pytest
from vos_support import Scripted, scripted, within

from trivisor.core.errors import ExecTimeout, GuestError, GuestGone, GuestProtocolError
from trivisor.vmm import program
from trivisor.vos import command as command_module
from trivisor.vos import guest as guest_verbs
from trivisor.vos import wire
from trivisor.vos.wire import Type

U32 = struct.Struct("<I")


def data(channel: int, content: bytes = b"") -> bytes:
    return bytes([channel]) + content


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Type.DATA, b""),
        (Type.DATA, data(0, b"x")),
        (Type.DATA, data(3, b"x")),
        (Type.EXITED, b""),
        (Type.EXITED, bytes(28)),
        (Type.EXITED, bytes(30)),
        (Type.EXITED, struct.pack("<BIQQQ", 1, 0, 0, 0, 0)),
        (Type.EXITED, struct.pack("<BIQQQ", 0, 1 << 31, 0, 0, 0)),
        (Type.STARTED, b""),
        (Type.STARTED, U32.pack(9)),
        (Type.WINDOW, b"\0"),
        (Type.WINDOW, struct.pack("<BI", 0, 1)),
        (Type.WINDOW, struct.pack("<BI", 0, 0xFFFFFFFF)),
        (Type.WINDOW, struct.pack("<BI", 1, 1)),
        (Type.ERROR, b""),
        (Type.ERROR, U32.pack(0) + wire.string("x")),
        (Type.ERROR, U32.pack(2) + U32.pack(500) + b"short"),
        (Type.OK, b""),
        (Type.PONG, b""),
        (Type.SYNC, bytes(20)),
        (Type.EXEC, b"\0"),
        (Type.KEEPER_INFO, b""),
        (0x7F, b"?"),
    ],
)
def test_a_frame_that_is_not_allowed_loses_the_line(kind: int, payload: bytes) -> None:
    def script(peer: Scripted) -> None:
        peer.send(kind, peer.run_one(), payload)
        peer.frame()

    with scripted(script) as peer, within(15):
        with pytest.raises(GuestProtocolError) as caught:
            peer.processes.exec(["x"])
        assert caught.value.machine == "test"
        assert peer.line.closed
        with pytest.raises(GuestProtocolError):
            peer.processes.exec(["x"])


@pytest.mark.parametrize("raw", [b"garbage, not a frame", wire.header(Type.DATA, 1, 1 << 30), b"T\x13\0\1" + bytes(8)])
def test_bytes_that_are_no_frame_lose_the_line(raw: bytes) -> None:
    def script(peer: Scripted) -> None:
        peer.run_one()
        peer.raw(raw)

    with scripted(script) as peer, within(15), pytest.raises(GuestProtocolError):
        peer.processes.exec(["x"])


def test_a_stream_that_nobody_opened() -> None:
    def script(peer: Scripted) -> None:
        peer.send(Type.DATA, peer.run_one() + 1000, data(1, b"x"))

    with scripted(script) as peer, within(15), pytest.raises(GuestProtocolError, match="nobody opened"):
        peer.processes.exec(["x"])


def test_a_stream_that_has_just_ended_is_ignored() -> None:
    def script(peer: Scripted) -> None:
        first = peer.run_one()
        peer.exited(first)
        peer.send(Type.WINDOW, first, struct.pack("<BI", 0, 1))
        second = peer.run_one()
        peer.output(second, b"fine")
        peer.exited(second)
        peer.frame()

    with scripted(script) as peer, within(15):
        assert peer.processes.exec(["x"]).exit_code == 0
        assert peer.processes.exec(["x"]).stdout == b"fine"


def test_more_than_the_window() -> None:
    spawned = threading.Event()

    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        spawned.wait(10)
        while True:
            peer.output(stream, bytes(wire.DATA_MAX))

    with scripted(script) as peer, within(15):
        process = peer.processes.spawn(["x"])
        spawned.set()
        with pytest.raises(GuestProtocolError, match="beyond its window"):
            process.wait(10)
        assert process._command.unread(wire.STDOUT) <= wire.WINDOW


def test_output_after_its_end() -> None:
    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        peer.output(stream, b"x")
        peer.send(Type.DATA, stream, data(1))
        peer.output(stream, b"y")

    with scripted(script) as peer, within(15), pytest.raises(GuestProtocolError, match="after its end"):
        peer.processes.exec(["x"])


def test_no_end_after_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "KILL_WAIT", 0.6)
    monkeypatch.setattr("trivisor.vos.capture.KILL_WAIT", 0.6)

    def script(peer: Scripted) -> None:
        first = peer.run_one()
        peer.output(first, b"part")
        peer.expect(Type.SIGNAL)
        peer.exited(peer.run_one())
        # The command that was left behind may still say something; it is thrown away.
        peer.output(first, bytes(1000))
        peer.exited(first)
        peer.exited(peer.run_one())
        peer.frame()

    with scripted(script) as peer, within(15):
        with pytest.raises(ExecTimeout) as caught:
            peer.processes.exec(["x"], timeout=0.1)
        assert caught.value.stdout == b"part"
        assert peer.processes.exec(["x"]).exit_code == 0
        assert peer.processes.exec(["x"]).exit_code == 0


def test_endless_output_after_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "KILL_WAIT", 0.3)
    monkeypatch.setattr("trivisor.vos.capture.KILL_WAIT", 0.3)

    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        window = wire.WINDOW
        while True:
            while window > wire.DATA_MAX:
                peer.output(stream, bytes(wire.DATA_MAX))
                window -= wire.DATA_MAX
            _, payload = peer.expect(Type.WINDOW)
            window += wire.parse_window(memoryview(payload))[1]

    with scripted(script) as peer, within(15), pytest.raises(ExecTimeout):
        peer.processes.exec(["x"], timeout=0.2, on_stdout=lambda b: None, max_output=1000)


def test_a_guest_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivisor.vos.capture.KILL_WAIT", 0.3)

    def script(peer: Scripted) -> None:
        peer.line.wait_closed(20)

    with scripted(script) as peer, within(15):
        with pytest.raises(ExecTimeout):
            peer.processes.exec(["x"], stdin=bytes(8 << 20), timeout=0.3)
        with pytest.raises(GuestError, match="no answer to PING within"):
            guest_verbs.ping(peer.line, timeout=0.2)


def test_a_line_that_closes_in_the_middle() -> None:
    def script(peer: Scripted) -> None:
        peer.output(peer.run_one(), b"x")
        peer.sock.close()

    with scripted(script) as peer, within(15), pytest.raises(GuestGone):
        peer.processes.exec(["x"])


def test_a_wrong_pong_and_hostile_stats() -> None:
    def script(peer: Scripted) -> None:
        stream, _ = peer.expect(Type.PING)
        peer.send(Type.PONG, stream, b"another")
        stream = peer.run_one()
        peer.output(stream, b"memory_total lots\n")
        peer.exited(stream)
        stream = peer.run_one()
        peer.output(stream, b"x 1\n" * 20_000)
        peer.exited(stream)
        peer.frame()

    with scripted(script) as peer, within(15):
        with pytest.raises(GuestProtocolError):
            guest_verbs.ping(peer.line)
        with pytest.raises(GuestProtocolError, match="lots"):
            guest_verbs.stats(peer.processes)
        with pytest.raises(GuestError, match="more than 64K"):
            guest_verbs.stats(peer.processes)


@pytest.mark.parametrize("said", [b"pid\n", b"pid x\n", b"exited 1\n", b"pid 0\n", b"pid 5\nexited -1\n", b"pid 5 6\n", b"pid \xff\n"])
def test_a_program_that_cannot_be(said: bytes) -> None:
    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        peer.output(stream, said)
        peer.exited(stream)
        peer.frame()

    with scripted(script) as peer, within(15), pytest.raises(GuestProtocolError, match="program"):
        program.ask(peer.processes)
