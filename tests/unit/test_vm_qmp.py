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
OK = b'{"return": {}}\r\n'
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
        thread.join(10)
        assert not thread.is_alive()


def hello(connection: socket.socket) -> None:
    connection.sendall(GREETING)
    connection.recv(4096)
    connection.sendall(OK)


def test_answers_and_events(peer: Callable[[Peer], Path]) -> None:
    def behave(connection: socket.socket) -> None:
        hello(connection)
        request, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        assert json.loads(request) == {"execute": "add-fd", "arguments": {"fdset-id": 1}}
        os.close(fds[0])
        connection.sendall(b'{"event": "STOP", "data": {}}\r\n{"return": {"fd": 5}}\r\n')
        connection.recv(4096)
        connection.sendall(b'{"error": {"class": "GenericError", "desc": "no such thing"}}\r\n')

    with Qmp.connect(peer(behave)) as qmp:
        assert qmp.ask("add-fd", {"fdset-id": 1}, fd=0) == {"fd": 5}
        with pytest.raises(EngineError, match="no such thing"):
            qmp.ask("device_del")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [(b"", "ended"), (b"garbage\r\n", "not JSON"), (b'{"return"', "ended"), (b"[1, 2]\r\n", "ended"), (b"x" * (5 << 20), "no end")],
    ids=["gone", "garbage", "half", "not-an-object", "endless"],
)
def test_bad_answers(peer: Callable[[Peer], Path], answer: bytes, fault: str) -> None:
    def behave(connection: socket.socket) -> None:
        hello(connection)
        connection.recv(4096)
        with contextlib.suppress(OSError):  # the client may have had enough
            connection.sendall(answer)

    with Qmp.connect(peer(behave)) as qmp, pytest.raises(EngineError, match=fault):
        qmp.ask("stop", timeout=5)


def test_silence_is_bounded(peer: Callable[[Peer], Path]) -> None:
    done = threading.Event()

    def behave(connection: socket.socket) -> None:
        hello(connection)
        done.wait(10)

    with Qmp.connect(peer(behave)) as qmp:
        begun = time.monotonic()
        with pytest.raises(EngineError, match="in time"):
            qmp.ask("stop", timeout=0.1)
        assert time.monotonic() - begun < 2
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
        assert 0.2 < time.monotonic() - begun < 5

        def take() -> None:
            listener.accept()[0].close()
            with listener.accept()[0] as connection:
                hello(connection)

        taking = threading.Timer(0.2, take)
        taking.start()
        Qmp.connect(path).close()
        taking.join(10)
