"""The QMP client against a peer that answers, lies, stalls and goes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trivisor.core.errors import EngineError
from trivisor.vmm.engines.vm.qmp import Qmp

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
Peer = Callable[[socket.socket], None]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[[Peer], Path]]:
    """Serve one connection with the given function; its path may be longer than a socket's address."""
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    threads: list[threading.Thread] = []

    def serve(behave: Peer) -> Path:
        listener = socket.socket(socket.AF_UNIX)
        fd = os.open(folder, os.O_PATH)
        listener.bind(f"/proc/self/fd/{fd}/qmp.sock")
        os.close(fd)
        listener.listen(1)

        def run() -> None:
            with listener:
                connection = listener.accept()[0]
            with connection:
                behave(connection)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return folder / "qmp.sock"

    yield serve
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def answer(connection: socket.socket, request: bytes, **what: object) -> None:
    """Answer as QEMU does: by the number of the request."""
    connection.sendall(json.dumps({**what, "id": json.loads(request)["id"]}).encode() + b"\r\n")


def hello(connection: socket.socket) -> None:
    connection.sendall(GREETING)
    answer(connection, connection.recv(4096), **{"return": {}})


def test_answers_and_events(peer: Callable[[Peer], Path]) -> None:
    def behave(connection: socket.socket) -> None:
        hello(connection)
        request, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        said = json.loads(request)
        assert (said["execute"], said["arguments"]) == ("add-fd", {"fdset-id": 1})
        os.close(fds[0])
        connection.sendall(b'{"event": "STOP", "data": {}}\r\n')
        answer(connection, request, **{"return": {"fd": 5}})
        answer(connection, connection.recv(4096), error={"class": "GenericError", "desc": "no such thing"})

    with Qmp.connect(peer(behave)) as qmp:
        assert qmp.ask("add-fd", {"fdset-id": 1}, fd=0) == {"fd": 5}
        with pytest.raises(EngineError, match="no such thing"):
            qmp.ask("device_del")


def test_what_the_client_before_did_not_wait_for_is_not_taken_for_an_answer(peer: Callable[[Peer], Path]) -> None:
    def behave(connection: socket.socket) -> None:
        connection.sendall(b'{"return": {}}\r\n' + GREETING + b'{"return": {"late": 1}}\r\n{"error": {"desc": "late"}, "id": "x"}\r\n')
        answer(connection, connection.recv(4096), **{"return": {}})
        connection.sendall(b'{"return": {"late": 2}}\r\n')
        answer(connection, connection.recv(4096), **{"return": {"mine": 1}})

    with Qmp.connect(peer(behave)) as qmp:
        assert qmp.ask("query-status") == {"mine": 1}


@pytest.mark.parametrize(
    ("said", "fault"),
    [(b"", "ended"), (b"garbage\r\n", "not JSON"), (b'{"return"', "ended"), (b"[1, 2]\r\n", "ended"), (b"x" * (5 << 20), "no end")],
    ids=["gone", "garbage", "half", "not-an-object", "endless"],
)
def test_bad_answers(peer: Callable[[Peer], Path], said: bytes, fault: str) -> None:
    def behave(connection: socket.socket) -> None:
        hello(connection)
        connection.recv(4096)
        with contextlib.suppress(OSError):  # the client may have had enough
            connection.sendall(said)

    with Qmp.connect(peer(behave)) as qmp, pytest.raises(EngineError, match=fault):
        qmp.ask("stop", timeout=30)


def test_silence_is_bounded(peer: Callable[[Peer], Path]) -> None:
    done = threading.Event()

    def behave(connection: socket.socket) -> None:
        hello(connection)
        done.wait(30)

    with Qmp.connect(peer(behave)) as qmp:
        begun = time.monotonic()
        with pytest.raises(EngineError, match="in time"):
            qmp.ask("stop", timeout=0.1)
        assert time.monotonic() - begun < 8
    done.set()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not answer"):
        Qmp.connect(tmp_path / "qmp.sock", "web")


def test_not_qmp(peer: Callable[[Peer], Path]) -> None:
    path = peer(lambda connection: connection.sendall(b'{"hello": 1}\r\n'))
    with pytest.raises(EngineError, match="not QMP"):
        Qmp.connect(path)


def test_who_comes_when_enough_wait_waits_too(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        begun = time.monotonic()
        with pytest.raises(EngineError):
            Qmp.connect(path, timeout=0.3)
        assert 0.2 < time.monotonic() - begun < 15

        def take() -> None:
            listener.accept()[0].close()
            with listener.accept()[0] as connection:
                hello(connection)

        taking = threading.Timer(0.2, take)
        taking.start()
        Qmp.connect(path).close()
        taking.join(10)
