"""tvinit guest, the real binary, driven over a socket pair with raw frames.

It is not PID 1 here, so steps that would change the host are refused; those are tested in a machine.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import raw_line as raw
from guest_support import Guest, running_guest
from raw_line import BUILTIN, DETACH, NO_STDIN, PTY, RawLine, exec_request

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes user")


@pytest.fixture
def guest() -> Iterator[Guest]:
    with running_guest() as running:
        yield running


@pytest.fixture
def line(guest: Guest) -> RawLine:
    return guest.line


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the open, or before the read
        return False


def used(pid: int) -> list[str]:
    """The processor's time that it has had, in ticks: of its own, and of the kernel's."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]


def gone_soon(pid: int, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def started(line: RawLine, stream: int) -> int:
    while True:
        kind, on, payload = line.receive()
        if on == stream:
            assert kind == raw.STARTED, (kind, payload)
            return int(struct.unpack("<I", payload)[0])


# ---- ends of commands ----


def test_output_and_exit_status(line: RawLine) -> None:
    r = line.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (r.how, r.value, bytes(r.stdout), bytes(r.stderr)) == ("exit", 7, b"out\n", b"err\n")
    assert r.pid > 0 and r.usage[2] > 0


def test_signal(line: RawLine) -> None:
    r = line.run(["sh", "-c", "kill -TERM $$"])
    assert (r.how, r.value) == ("signal", signal.SIGTERM)


def test_missing_program_is_127(line: RawLine) -> None:
    r = line.run(["no-such-program"])
    assert (r.how, r.value) == ("exit", 127) and b"no-such-program: not found" in r.stderr
    assert line.run(["/no/such"]).value == 127


def test_what_cannot_be_executed_is_126(line: RawLine, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    (tmp_path / "garbage").write_text("garbage")
    (tmp_path / "garbage").chmod(0o755)
    for name in ("plain", "garbage", ""):
        r = line.run([f"{tmp_path}/{name}"])
        assert (r.how, r.value) == ("exit", 126) and r.stderr


def test_program_is_looked_up_in_its_own_path(line: RawLine, tmp_path: Path) -> None:
    tool = tmp_path / "mine"
    tool.write_text("#!/bin/sh\necho mine $1\n")
    tool.chmod(0o755)
    assert line.run(["mine"]).value == 127
    assert line.run(["mine", "x"], env={"PATH": f"/nowhere:{tmp_path}:/bin"}).stdout == b"mine x\n"


def test_bad_folder_or_user_is_an_error(line: RawLine) -> None:
    r = line.run(["true"], cwd="/no/such")
    assert (r.how, r.value) == ("error", errno.ENOENT) and "/no/such" in r.text
    r = line.run(["true"], user="no-such-user")
    assert (r.how, r.value) == ("error", errno.ENOENT) and "no-such-user" in r.text


def test_environment(line: RawLine) -> None:
    assert line.steps(["env", "FROM_STEP=1", "BOTH=step"]).how == "exit"
    r = line.run(["env"], env={"BOTH": "request", "MINE": "a=b"})
    env = dict(pair.split("=", 1) for pair in r.stdout.decode().splitlines())
    assert env["FROM_STEP"] == "1" and env["BOTH"] == "request" and env["MINE"] == "a=b"
    assert {"PATH", "HOME", "USER", "LOGNAME", "SHELL"} <= env.keys() and "TERM" not in env


def test_end_does_not_wait_for_who_still_holds_the_pipes(line: RawLine) -> None:
    begun = time.monotonic()
    r = line.run(["sh", "-c", "sleep 60 & echo $!; exit 3"], flags=NO_STDIN)
    assert r.value == 3 and time.monotonic() - begun < 10
    os.kill(int(r.stdout), signal.SIGKILL)


def test_many_at_once(line: RawLine) -> None:
    streams = [line.start(exec_request(["sh", "-c", f"echo {i}"], flags=NO_STDIN)) for i in range(50)]
    out = dict.fromkeys(streams, b"")
    left = set(streams)
    while left:
        kind, on, payload = line.receive()
        if kind == raw.DATA and payload[0] == 1:
            out[on] += payload[1:]
        elif kind == raw.EXITED:
            left.discard(on)
    assert [out[s] for s in streams] == [f"{i}\n".encode() for i in range(50)]


def test_too_many_commands(line: RawLine) -> None:
    for _ in range(512):
        line.start(exec_request(["sleep", "100"], flags=NO_STDIN))
    r = line.run(["true"])
    assert (r.how, r.value) == ("error", errno.EAGAIN)


# ---- streams ----


def test_64_mb_through_cat(line: RawLine) -> None:
    data = os.urandom(1 << 20) * 64
    r = line.run(["cat"], data)
    assert r.how == "exit" and r.value == 0 and r.stdout == data


def test_command_that_does_not_read_its_input(line: RawLine) -> None:
    r = line.run(["sh", "-c", "exec <&-; sleep 0.2; echo done"], bytes(10 << 20))
    assert (r.value, bytes(r.stdout)) == (0, b"done\n")


def test_more_than_was_granted(line: RawLine) -> None:
    stream = line.start(exec_request(["sleep", "100"]))
    pid = started(line, stream)
    for _ in range(13):  # 13 x 32755 is past the window and what a pipe holds
        line.data(stream, bytes(32755))
    r = line.finish(stream, None)
    assert (r.how, r.value) == ("error", errno.EPROTO)
    assert gone_soon(pid)
    assert line.run(["echo", "lives"]).stdout == b"lives\n"


def until(line: RawLine, stream: int, word: bytes) -> None:
    """Read the stream's output until it has said the word."""
    seen = b""
    while word not in seen:
        kind, on, payload = line.receive()
        assert (kind, on) != (raw.EXITED, stream), seen
        seen += payload[1:] if kind == raw.DATA and on == stream else b""


def test_signal_frames(line: RawLine) -> None:
    stream = line.start(exec_request(["sh", "-c", "trap 'echo got' USR1; echo ready; while :; do sleep 0.05; done"]))
    until(line, stream, b"ready")
    line.send(raw.SIGNAL, stream, struct.pack("<IB", signal.SIGUSR1, 0))
    until(line, stream, b"got")
    line.send(raw.SIGNAL, stream, struct.pack("<IB", 0, 0))
    line.send(raw.SIGNAL, stream, struct.pack("<IB", 1000, 0))
    line.send(raw.SIGNAL, stream, struct.pack("<IB", signal.SIGKILL, 1))
    r = line.finish(stream, None)
    assert (r.how, r.value) == ("signal", signal.SIGKILL)


# ---- terminals ----


def test_terminal(line: RawLine) -> None:
    r = line.run(["sh", "-c", "test -t 0 && test -t 1 && test -t 2 && stty size && echo $TERM"], flags=PTY, rows=33, columns=99)
    assert bytes(r.stdout) == b"33 99\r\nxterm-256color\r\n"


def test_terminal_resize_and_end_of_input(line: RawLine) -> None:
    stream = line.start(exec_request(["sh", "-c", "trap 'stty size' WINCH; echo ready; cat; exit 4"], flags=PTY))
    until(line, stream, b"ready")
    line.send(raw.RESIZE, stream, struct.pack("<HH", 40, 120))
    line.data(stream, b"typed\n")
    line.data(stream)
    r = line.finish(stream, None)
    assert r.value == 4 and b"typed" in r.stdout and b"40 120" in r.stdout


def test_control_c(line: RawLine) -> None:
    stream = line.start(exec_request(["sh", "-c", "echo ready; exec sleep 100"], flags=PTY))
    until(line, stream, b"ready")
    line.data(stream, b"\x03")
    r = line.finish(stream, None)
    assert (r.how, r.value) == ("signal", signal.SIGINT)


# ---- users ----


@root_only
def test_users(line: RawLine) -> None:
    shown = line.run(["sh", "-c", "id -u; id -g; id -G; echo $USER"], user="daemon").stdout.decode().split()
    assert shown == ["1", "1", "1", "daemon"]
    assert line.run(["sh", "-c", "id -u; id -g"], user="12345:54321").stdout == b"12345\n54321\n"
    assert line.run(["sh", "-c", "id -u; id -g"], user="daemon:adm").stdout == b"1\n4\n"
    r = line.run(["write", "/etc/nothing-of-ours", "644", "-"], flags=BUILTIN, user="daemon")
    assert (r.how, r.value) == ("exit", errno.EACCES)


# ---- clients that leave, lines that begin anew ----


def test_gone_kills_but_what_was_detached(line: RawLine) -> None:
    kept = started(line, line.start(exec_request(["sleep", "100"], flags=DETACH), stream=0x20001))
    killed = started(line, line.start(exec_request(["sh", "-c", "sleep 100 & wait"]), stream=0x20002))
    other = started(line, line.start(exec_request(["sleep", "100"]), stream=0x30001))
    line.send(raw.GONE, 2 << 16)
    assert gone_soon(killed)
    assert line.run(["true"]).value == 0
    assert alive(kept) and alive(other)


def test_sync_detaches_and_kills_nothing(line: RawLine) -> None:
    talker = started(line, line.start(exec_request(["sh", "-c", "while :; do echo more; done"], flags=NO_STDIN)))
    silent = started(line, line.start(exec_request(["cat"])))
    builtin = line.start(exec_request(["write", "/dev/null", "644", "-"], flags=BUILTIN))
    while True:  # the talker has filled its window
        kind, on, payload = line.receive()
        if on == builtin and kind == raw.STARTED:
            served = struct.unpack("<I", payload)[0]
            break
    line.sync()
    line.send(raw.PING, 5, b"quiet?")
    assert line.receive() == (raw.PONG, 5, b"quiet?")
    before, end = used(talker), time.monotonic() + 30
    while used(talker) == before:
        assert time.monotonic() < end, "a detached command stands still"
        time.sleep(0.02)
    assert alive(silent) and gone_soon(served)
    os.kill(talker, signal.SIGKILL)


def test_malformed_frames_are_skipped_to_the_next_sync(line: RawLine) -> None:
    line.sock.sendall(b"garbage" + os.urandom(5000))
    line.sync()
    assert line.run(["echo", "back"]).stdout == b"back\n"


def test_unknown_frame_type(line: RawLine) -> None:
    line.send(0x7E, 9)
    kind, on, payload = line.receive()
    assert (kind, on, payload[:4]) == (raw.ERROR, 9, struct.pack("<I", errno.ENOSYS))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"\xff" * 40,
        struct.pack("<IHH", 0, 0, 0) + raw.string("") * 2 + struct.pack("<II", 0xFFFFFFFF, 0),
        exec_request([]),
        exec_request([""]),
        exec_request(["a"], flags=16),
        exec_request(["a"])[:-1],
        exec_request(["a"]) + b"x",
        exec_request(["a\0b"]),
        struct.pack("<IHH", 0, 0, 0) + raw.string("") * 2 + raw.strings(["true"]) + raw.strings(["novalue"]),
    ],
)
def test_hostile_requests(line: RawLine, request_bytes: bytes) -> None:
    stream = line.stream()
    line.send(raw.EXEC, stream, b"\0" + request_bytes)
    r = line.finish(stream, None)
    assert (r.how, r.value) == ("error", errno.EINVAL)
    assert line.run(["true"]).value == 0


def test_request_in_many_frames_and_too_big(line: RawLine) -> None:
    assert len(line.run(["echo", *["x" * 100] * 5000]).stdout) == 101 * 5000
    r = line.finish(line.start(exec_request(["echo", "x" * (1 << 20)])), None)
    assert (r.how, r.value) == ("error", errno.E2BIG)
    assert line.run(["true"]).value == 0


def test_steps(line: RawLine) -> None:
    assert line.steps(["sync"], ["wait", "/"], ["warm", "true"]).how == "exit"
    r = line.steps(["sync"], ["root", "/dev/x", "ram"])
    assert (r.how, r.value) == ("error", errno.EPERM) and "step 2, root /dev/x ram" in r.text
    assert line.steps(["sync"], ["no-such-step"]).value == errno.EINVAL
    assert line.steps(["sync", "too-many"]).value == errno.EINVAL


def test_shutdown(guest: Guest, line: RawLine) -> None:
    polite = line.start(exec_request(["sh", "-c", "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done"]))
    stubborn = started(line, line.start(exec_request(["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"])))
    until(line, polite, b"ready")
    line.send(raw.SHUTDOWN, 0, b"\0")
    frames = []
    while not frames or frames[-1][0] != raw.BYE:
        frames.append(line.receive())
    assert (raw.DATA, polite, b"\x01bye\n") in frames
    assert guest.process.wait(30) == 0
    assert gone_soon(stubborn)


def test_end_of_the_line_ends_everything(guest: Guest, line: RawLine) -> None:
    pid = started(line, line.start(exec_request(["sleep", "100"])))
    line.sock.close()
    assert guest.process.wait(30) == 0
    assert gone_soon(pid)
