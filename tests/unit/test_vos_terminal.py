"""The caller's terminal joined to a command's: both are real, the caller's is a pty of this test."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Iterator

import pytest
from vos_support import RealGuest, real_guest, within

from trivisor.core.errors import GuestGone
from trivisor.vos.terminal import attach, size_of


@pytest.fixture
def guest() -> Iterator[RealGuest]:
    with real_guest() as running:
        yield running


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """(the user's side, the program's side)"""
    user, program = os.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    yield user, program
    os.close(user)
    os.close(program)


class User(threading.Thread):
    """Types what `script` says, each after what it waits for has appeared."""

    def __init__(self, fd: int, *script: tuple[bytes, bytes]) -> None:
        super().__init__(daemon=True)
        self.fd, self.script, self.seen = fd, script, b""
        self.start()

    def run(self) -> None:
        for awaited, typed in self.script:
            self.read_until(awaited)
            if typed == b"(resize)":
                fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
                os.kill(os.getpid(), signal.SIGWINCH)
            else:
                os.write(self.fd, typed)

    def read_until(self, awaited: bytes, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while awaited not in self.seen and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536)


def test_a_session(guest: RealGuest, terminal: tuple[int, int]) -> None:
    user_fd, fd = terminal
    before, winch = termios.tcgetattr(fd), signal.getsignal(signal.SIGWINCH)
    process = guest.processes.spawn(["sh"], pty=True, env={"PS1": "ready> "})
    user = User(
        user_fd,
        (b"ready> ", b"stty size; echo A$((1+1))A\n"),
        (b"A2A", b"(resize)"),
        (b"", b'until [ "$(stty size)" = "50 1"20 ]; do sleep 0.02; done; stty size; echo B$((1+1))B\n'),
        (b"B2B", b"sh -c 'echo C$((1+2))C; exec sleep 60'\n"),
        (b"C3C", b"\x03"),
        (b"^C", b"exit 7\n"),
    )
    with within(60):
        assert attach(process, fd, fd) == 7
    user.join(5)
    user.read_until(b"exit 7", 1)
    assert b"30 90" in user.seen
    assert b"50 120" in user.seen
    assert termios.tcgetattr(fd) == before
    assert signal.getsignal(signal.SIGWINCH) == winch


def test_the_terminal_is_put_back_when_the_machine_goes(guest: RealGuest, terminal: tuple[int, int]) -> None:
    _, fd = terminal
    before = termios.tcgetattr(fd)
    process = guest.processes.spawn(["sleep", "60"], pty=True)
    threading.Timer(0.2, guest.process.kill).start()
    with within(30), pytest.raises(GuestGone):
        attach(process, fd, fd)
    assert termios.tcgetattr(fd) == before


def test_without_a_terminal(guest: RealGuest) -> None:
    stdin, typed = os.pipe()
    shown, stdout = os.pipe()
    os.write(typed, b"echo out; exit 3\n")
    os.close(typed)
    with within(30):
        assert attach(guest.processes.spawn(["sh"], pty=True), stdin, stdout) == 3
    os.close(stdout)
    with open(shown, "rb") as pipe:
        assert b"out\r\n" in pipe.read()
    assert size_of(stdin) == (24, 80)
    os.close(stdin)
