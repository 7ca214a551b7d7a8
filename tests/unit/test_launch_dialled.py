"""Lines that the guest makes by calling its keeper, as behind gVisor: it may end one and call again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_support import SCRIPT, Life, frame, info, read_frame

from trivisor.core.errors import EngineError
from trivisor.core.paths import MachineDir
from trivisor.launch import keeper, tvinit
from trivisor.launch.plan import Plan
from trivisor.vos import guest
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes

CALL = """
import socket
def call():
    global line
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    line = s.detach()
"""


@contextlib.contextmanager
def life(folder: Path, code: str = "", *, wait: float = 10, helper: str = "") -> Iterator[Life]:
    """A machine whose engine is tvinit, or a script that plays a guest, and that has a socket to call."""
    machine = MachineDir(folder)
    door = folder / "door"
    argv = [sys.executable, "-S", "-E", "-c", SCRIPT + CALL + code] if code else [str(tvinit.path()), "guest", "--connect"]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(door))
        output, error = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, output)
        stack.callback(os.close, error)
        plan: Plan = (("fd", str(error), "2"), ("exec", *argv, str(door)))
        try:
            kept = keeper.spawn(
                machine,
                processes=[keeper.Process("engine", plan)],
                line_fd=listener.fileno(),
                dialled=True,
                logs={"engine": output},
                fds=[error],
                wait=wait,
            )
            stack.close()
            yield Life(machine, kept)
        finally:
            keeper.kill(machine)


def processes(line: Line) -> Processes:
    return Processes(lambda: line, "m", {})


def test_tvinit_calls_and_serves(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        line = Line.connect(one.machine.line, "m")
        try:
            assert processes(line).exec(["echo", "called"]).text == "called\n"
        finally:
            line.close()


def test_a_line_cut_by_the_guest_comes_back(tmp_path: Path) -> None:
    """What tvinit will do before a checkpoint; here something cuts its connection."""
    with life(tmp_path) as one:
        line = Line.connect(one.machine.line, "m")
        try:
            kept = processes(line).spawn(["sleep", "60"], detach=True)
        finally:
            line.close()
        with one.connect() as silent:  # the guest does not know this client: nothing of it is lost
            assert info(silent)["synced"] == "1"
            _cut(one.kept.engine_pid, str(tmp_path / "door"))
            line = Line.connect(one.machine.line, "m")
            try:
                assert processes(line).exec(["sh", "-c", f"kill {kept.pid} && echo alive"]).text == "alive\n"
            finally:
                line.close()
            assert info(silent)["synced"] == "1"


def test_a_guest_sent_away_calls_when_there_is_a_door_again(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        line = Line.connect(one.machine.line, "m")
        door, elsewhere = tmp_path / "door", tmp_path / "elsewhere"
        try:
            kept = processes(line).spawn(["sleep", "60"], detach=True)
            door.rename(elsewhere)
            guest.configure(line, [("away",)])
        finally:
            line.close()
        with one.connect() as client:
            deadline = time.monotonic() + 30
            while info(client)["synced"] == "1":
                assert time.monotonic() < deadline
            elsewhere.rename(door)
        line = Line.connect(one.machine.line, "m")
        try:
            assert processes(line).exec(["sh", "-c", f"kill {kept.pid} && echo alive"]).text == "alive\n"
        finally:
            line.close()


def _cut(pid: int, door: str) -> None:
    """Take a guest's connection away under it, without its knowing: what it then reads is the end."""
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    copy = _getfd(pidfd, int(name))
                    with socket.socket(fileno=copy) as peer:
                        if peer.family == socket.AF_UNIX and peer.getpeername() == door:
                            peer.shutdown(socket.SHUT_RDWR)
                            return
    finally:
        os.close(pidfd)
    raise AssertionError("the guest has no such connection")


def _getfd(pidfd: int, fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    copy = libc.syscall(438, pidfd, fd, 0)  # pidfd_getfd(2), the same number everywhere
    if copy < 0:
        pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}: needs ptrace rights over a child of another")
    return int(copy)


TWICE = """
call(); synced()
while next_frame()[0] != 12:
    pass
os.close(line)
call(); synced()
while True:
    type, stream, payload = next_frame()
    if type == 12:
        os.write(line, frame(13, stream, b"again"))
"""


def test_clients_of_the_line_before_are_let_go(tmp_path: Path) -> None:
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        with life(folder, TWICE) as one, one.connect() as first, one.connect() as second:
            first.sendall(frame(0x0C, 1, b"x"))
            began = time.monotonic()
            assert first.recv(1) == b""  # its streams were the old line's
            took = time.monotonic() - began
            second.sendall(frame(0x0C, 7, b"x"))
            assert read_frame(second) == (0x0D, 7, b"again")
        if took < 0.9:  # at the new call, not when the time is up; anything may be late on a busy host, but not always
            return
    pytest.fail("only when the time was up")


AWAY = """
call(); synced()
while next_frame()[0] != 12:
    pass
os.close(line)
time.sleep(60)
"""


def test_a_guest_that_does_not_call_again_is_given_up_by_clients(tmp_path: Path) -> None:
    with life(tmp_path, AWAY) as one:
        with one.connect() as client:
            client.sendall(frame(0x0C, 1, b"x"))
            assert client.recv(1) == b""
        assert keeper.alive(one.machine)  # the machine runs; it only does not answer
        with one.connect() as late:
            late.sendall(frame(0x0C, 1, b"x"))
            assert late.recv(1) == b""


def test_a_guest_that_never_calls_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="did not answer within"), life(tmp_path, "time.sleep(60)", wait=0.5):
        pass


def test_two_calls_at_once_are_taken_one_after_the_other(tmp_path: Path) -> None:
    code = """
call(); first = line
call(); second = line
line = first; synced()
os.close(first)
line = second; synced()
while True:
    type, stream, payload = next_frame()
    if type == 12:
        os.write(line, frame(13, stream, b"second"))
"""
    with life(tmp_path, code) as one, one.connect() as client:
        while info(client)["synced"] != "1":
            time.sleep(0.01)
        deadline = time.monotonic() + 30
        reply: tuple[int, int, bytes] = (0, 0, b"")
        while reply[0] == 0 and time.monotonic() < deadline:
            with one.connect() as asking, contextlib.suppress(ConnectionError):  # it is let go with the first
                asking.sendall(frame(0x0C, 3, b"x"))
                reply = read_frame(asking)
        assert reply == (0x0D, 3, b"second")


def test_nobody_to_call(tmp_path: Path) -> None:
    done = subprocess.run(
        [tvinit.path(), "guest", "--connect", str(tmp_path / "none")], capture_output=True, timeout=10, check=False, text=True
    )
    assert done.returncode == 1 and "No such file" in done.stderr
