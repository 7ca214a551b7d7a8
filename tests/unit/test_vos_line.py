"""The line itself: connecting, closing, forks, many threads, many streams."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from vos_support import Scripted, real_guest, scripted, within

from trivisor.core.errors import GuestError, GuestGone
from trivisor.vos import guest as guest_verbs
from trivisor.vos import wire
from trivisor.vos.line import Line
from trivisor.vos.wire import Type


def answer_pings(peer: Scripted) -> None:
    while True:
        kind, stream, payload = peer.frame()
        if kind == Type.PING:
            peer.send(Type.PONG, stream, payload)


def listening(path: Path) -> socket.socket:
    """A socket bound at `path` however long that is."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"/proc/self/fd/{folder}/{path.name}")
        sock.listen()
    finally:
        os.close(folder)
    return sock


@pytest.mark.parametrize("depth", [0, 3])
def test_connect_however_long_the_path(tmp_path: Path, depth: int) -> None:
    folder = tmp_path.joinpath(*["long" * 20] * depth)
    folder.mkdir(parents=True, exist_ok=True)
    with listening(folder / "line.sock") as server:
        line = Line.connect(folder / "line.sock", "m")
        peer, _ = server.accept()
        with peer:
            line.post(wire.frame(Type.PING, 1))
            assert peer.recv(100) == wire.frame(Type.PING, 1)
        assert line.wait_closed(30)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(GuestGone) as caught:
        Line.connect(tmp_path / "line.sock", "m")
    assert caught.value.machine == "m"
    listening(tmp_path / "dead").close()
    with pytest.raises(GuestGone):
        Line.connect(tmp_path / "dead", "m")


def test_keeper_info() -> None:
    def script(peer: Scripted) -> None:
        stream, _ = peer.expect(Type.KEEPER)
        peer.send(Type.KEEPER_INFO, stream, b"keeper=12\nengine=13\nsynced=1\n")
        peer.frame()

    with scripted(script) as peer:
        assert peer.line.keeper_info() == {"keeper": "12", "engine": "13", "synced": "1"}


def test_an_error_answer_and_one_that_comes_late() -> None:
    late = threading.Event()

    def script(peer: Scripted) -> None:
        stream, _ = peer.expect(Type.STEPS)
        peer.send(Type.ERROR, stream, struct.pack("<I", 2) + wire.string("step 3, wait /dev/x"))
        stream, payload = peer.expect(Type.PING)
        late.wait(30)
        peer.send(Type.PONG, stream, payload)
        answer_pings(peer)

    with scripted(script) as peer:
        with pytest.raises(GuestError, match="step 3, wait /dev/x: No such file"):
            guest_verbs.configure(peer.line, [["wait", "/dev/x"]])
        with pytest.raises(GuestError, match=r"within 0\.1 s"):
            guest_verbs.ping(peer.line, timeout=0.1)
        late.set()
        guest_verbs.ping(peer.line)


def test_close_ends_what_is_under_way() -> None:
    with scripted(lambda peer: peer.expect(Type.SIGNAL)) as peer, within(15):
        threading.Timer(0.1, peer.line.close).start()
        with pytest.raises(GuestGone, match="closed"):
            peer.processes.exec(["x"])
        peer.line.close()
        with pytest.raises(GuestGone):
            guest_verbs.ping(peer.line)


def test_nothing_is_left_of_a_closed_line() -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with scripted(answer_pings) as peer:
            guest_verbs.ping(peer.line)
    # Some of an earlier test may have been on their way out.
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_forked_child_leaves_its_parents_line_alone() -> None:
    with scripted(answer_pings) as peer:
        guest_verbs.ping(peer.line)
        child = os.fork()
        if child == 0:
            try:
                assert peer.line.closed
                with pytest.raises(GuestGone, match="parent process"):
                    guest_verbs.ping(peer.line)
                peer.line.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert not peer.line.closed
        guest_verbs.ping(peer.line)


def test_a_forked_child_may_leave_what_its_parent_began() -> None:
    """Even if the reading thread held the command's lock at the fork."""
    with real_guest() as guest, within(20), guest.processes.spawn(["cat"]) as process:
        process._command.changed.acquire()
        child = os.fork()
        if child == 0:
            try:
                for use in (process.wait, process.stdout.read, lambda: process.stdin.write(b"x"), process.kill):
                    with pytest.raises(GuestGone):
                        use()
                process.close()
                guest.line.close()
                os._exit(0)
            finally:
                os._exit(1)
        process._command.changed.release()
        assert os.waitpid(child, 0)[1] == 0
        process.stdin.write(b"still ours")
        process.stdin.close()
        assert process.stdout.read() == b"still ours"


def test_a_forked_child_does_not_keep_its_parents_line_open() -> None:
    ours, theirs = socket.socketpair()
    line = Line(ours, "m")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        theirs.close()
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        line.close()
        theirs.settimeout(30)
        assert theirs.recv(1) == b""
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)
        theirs.close()


def test_stream_numbers_go_round_without_meeting() -> None:
    def script(peer: Scripted) -> None:
        long = peer.run_one()
        seen = {long}
        for _ in range(40):
            stream, payload = peer.expect(Type.PING)
            assert stream not in seen
            peer.send(Type.PONG, stream, payload)
        peer.exited(long)

    with scripted(script) as peer:
        process = peer.processes.spawn(["x"])
        peer.line._numbers = iter([*range(65530, 65536), *range(1, 100)])
        for _ in range(40):
            guest_verbs.ping(peer.line)
        assert process.wait(30) == 0


def test_many_threads_at_once() -> None:
    """The frames of one are never torn by those of another."""
    with real_guest() as guest, within(60):
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(8):
                    data = bytes([number]) * (1 + 70_000 * turn)
                    assert guest.processes.exec(["cat"], stdin=data).stdout == data
                    guest_verbs.ping(guest.line)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def test_a_paused_peer_is_waited_for() -> None:
    """A peer that reads nothing for a while, as a paused machine does, loses nothing."""
    with real_guest() as guest, within(20):
        data = os.urandom(1000) * 4000
        os.kill(guest.process.pid, 19)
        began = time.monotonic()
        threading.Timer(0.5, lambda: os.kill(guest.process.pid, 18)).start()
        assert guest.processes.exec(["cat"], stdin=data).stdout == data
        assert time.monotonic() - began > 0.4
