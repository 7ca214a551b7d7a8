"""A real guest on a socket pair, and a scripted one for what no real guest would send."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import trivisor
from trivisor.vos import wire
from trivisor.vos.files import Files
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes
from trivisor.vos.wire import Type

TVINIT = Path(trivisor.__file__).parent / "_guest" / "tvinit"


def synchronise(sock: socket.socket) -> None:
    """What the keeper does first."""
    nonce = os.urandom(wire.NONCE_SIZE)
    sock.settimeout(30)
    sock.sendall(bytes(wire.RESYNC) + wire.frame(Type.SYNC, 0, nonce + struct.pack("<I", wire.VERSION)))
    got = b""
    while nonce not in got:
        part = sock.recv(65536)
        assert part, "the guest went before it was synchronised"
        got += part
    assert got.endswith(nonce + struct.pack("<I", wire.VERSION))


class RealGuest:
    """`tvinit guest` as an ordinary process of this host."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [str(TVINIT), "guest", "--fd", str(theirs.fileno())]
            self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        synchronise(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * wire.WINDOW)
        self.line = Line(ours, "test")
        self.processes = Processes(lambda: self.line, "test", {"FROM_SPEC": "yes"})
        self.files = Files(self.processes)

    def close(self) -> None:
        self.line.close()
        self.process.kill()
        self.process.wait(10)


@contextmanager
def real_guest() -> Iterator[RealGuest]:
    if not TVINIT.exists():
        pytest.skip("tvinit is not built: make -C guest")
    guest = RealGuest()
    try:
        yield guest
    finally:
        guest.close()


Script = Callable[["Scripted"], None]


class Scripted:
    """A peer that runs `script` in a thread: it reads frames and sends what it likes."""

    def __init__(self, script: Script) -> None:
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(20)
        self.parser = wire.Parser()
        self._frames: list[tuple[int, int, bytes]] = []
        self.line = Line(ours, "test")
        self.processes = Processes(lambda: self.line, "test")
        self.files = Files(self.processes, timeout=20)
        self.thread = threading.Thread(target=self._run, args=(script,), daemon=True)
        self.thread.start()

    def _run(self, script: Script) -> None:
        with contextlib.suppress(OSError):  # the line under test closed: what it is for
            script(self)

    def frame(self) -> tuple[int, int, bytes]:
        """The next frame from the host."""
        while not self._frames:
            count = self.sock.recv_into(self.parser.space())
            if count == 0:
                raise ConnectionError
            self._frames += [(kind, stream, bytes(payload)) for kind, stream, payload in self.parser.frames(count)]
        return self._frames.pop(0)

    def expect(self, kind: int) -> tuple[int, bytes]:
        """Read frames up to one of `kind`; its stream and payload."""
        while True:
            got, stream, payload = self.frame()
            if got == kind:
                return stream, payload

    def send(self, kind: int, stream: int, payload: bytes = b"") -> None:
        self.sock.sendall(wire.frame(kind, stream, payload))

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def output(self, stream: int, data: bytes, channel: int = wire.STDOUT) -> None:
        for at in range(0, len(data), wire.DATA_MAX):
            part = data[at : at + wire.DATA_MAX]
            self.raw(wire.data_head(stream, channel, len(part)) + part)

    def exited(self, stream: int, status: int = 0, how: int = 0) -> None:
        self.send(Type.EXITED, stream, struct.pack("<BIQQQ", how, status, 0, 0, 0))

    def run_one(self) -> int:
        """Take an EXEC and say that it started."""
        stream, _ = self.expect(Type.EXEC)
        self.send(Type.STARTED, stream, struct.pack("<I", 7))
        return stream

    def close(self) -> None:
        self.line.close()
        self.sock.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    peer = Scripted(script)
    try:
        yield peer
    finally:
        peer.close()


class Gate:
    """A file that a command waits for before it does what it may not live to do: tests need no time that is long enough."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._open, self._passed = folder / "open", folder / "passed"
        self.script = f"until [ -e {self._open} ]; do sleep 0.02; done; touch {self._passed}"
        """For a shell: wait, then leave a mark."""

    def open(self) -> None:
        self._open.touch()

    def passed(self, seconds: float) -> bool:
        """Whether anybody comes through in that time."""
        end = time.monotonic() + seconds
        while not self._passed.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return self._passed.exists()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block must end within `seconds`."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
