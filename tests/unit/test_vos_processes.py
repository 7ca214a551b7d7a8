"""Commands in a real guest."""

from __future__ import annotations

import io
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vos_support import Gate, RealGuest, real_guest, within

from trivisor.core.errors import ExecFailed, ExecTimeout, GuestError, GuestGone, InvalidSpec
from trivisor.vos import guest as guest_verbs

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest() -> Iterator[RealGuest]:
    with real_guest() as running:
        yield running


def test_output_status_and_figures(guest: RealGuest) -> None:
    result = guest.processes.exec(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.exit_code, result.signal, result.stdout, result.stderr, result.ok) == (3, None, b"out\n", b"err\n", False)
    assert result.text == "out\n"
    assert result.duration > 0
    assert result.peak_memory > 100_000


def test_a_text_is_a_line_for_the_shell(guest: RealGuest) -> None:
    assert guest.processes.exec("echo $((6 * 7))").text == "42\n"


def test_environment_and_folder(guest: RealGuest) -> None:
    result = guest.processes.exec('echo "$FROM_SPEC $OWN"; pwd', env={"OWN": "é", "FROM_SPEC": "over"}, cwd="/usr")
    assert result.text == "over é\n/usr\n"
    assert guest.processes.exec('echo "$FROM_SPEC"').text == "yes\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user's commands")
def test_users(guest: RealGuest) -> None:
    assert guest.processes.exec("id -u; echo $HOME", user="nobody").text.startswith("65534\n")
    assert guest.processes.exec("id -u; id -g", user="1234:77").text == "1234\n77\n"
    with pytest.raises(GuestError, match="user"):
        guest.processes.exec("true", user="no-such-user")


def test_a_folder_that_is_not_there(guest: RealGuest) -> None:
    with pytest.raises(GuestError, match="No such file"):
        guest.processes.exec("true", cwd="/no/such/folder")


def test_missing_and_not_executable_are_as_in_a_shell(guest: RealGuest) -> None:
    missing = guest.processes.exec(["no-such-program"])
    assert (missing.exit_code, b"no-such-program" in missing.stderr) == (127, True)
    assert guest.processes.exec(["/etc/passwd"]).exit_code == 126


def test_killed_by_a_signal(guest: RealGuest) -> None:
    result = guest.processes.exec("kill -15 $$")
    assert (result.exit_code, result.signal) == (143, 15)


def test_check_raises_with_the_result(guest: RealGuest) -> None:
    with pytest.raises(ExecFailed, match="exit status 4: why") as caught:
        guest.processes.exec("echo why >&2; exit 4", check=True)
    assert caught.value.result.exit_code == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("argv", [[], [""], [b"x"], [1]])
def test_what_is_no_command_is_refused(guest: RealGuest, argv: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidSpec):
        guest.processes.exec(argv)


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A": 1}, {"A": "x\0"}])
def test_what_is_no_environment_is_refused(guest: RealGuest, env: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidSpec):
        guest.processes.exec("true", env=env)


def test_64_mb_in_and_out_at_once(guest: RealGuest) -> None:
    data = os.urandom(MIB) * 64
    assert guest.processes.exec(["cat"], stdin=data, timeout=60).stdout == data


def test_64_mb_in_that_nobody_reads(guest: RealGuest) -> None:
    with within(30):
        assert guest.processes.exec(["true"], stdin=bytes(64 * MIB)).exit_code == 0
        assert guest.processes.exec("exec <&-; sleep 0.1", stdin=bytes(64 * MIB), timeout=20).exit_code == 0


def test_stdin_from_text_files_pipes_and_iterables(guest: RealGuest, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = guest.processes.exec
    assert run(["cat"], stdin="text é").text == "text é"
    (tmp_path / "in").write_bytes(b"x" * 700_000)
    with open(tmp_path / "in", "rb") as file:
        assert run(["wc", "-c"], stdin=file).text.strip() == "700000"
    assert run(["cat"], stdin=io.BytesIO(b"bytes")).stdout == b"bytes"
    assert run(["cat"], stdin=(bytes([65 + n]) for n in range(3))).stdout == b"ABC"
    assert run(["cat"], stdin=bytearray(b"array")).stdout == b"array"
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb", buffering=0) as end:
        threading.Timer(0.1, lambda: (end.write(b"late"), end.close())).start()
        assert run(["cat"], stdin=pipe).stdout == b"late"
    assert run(["cat"]).stdout == b""


def test_a_stdin_that_fails_kills_the_command_and_goes_through(guest: RealGuest) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise LookupError("mine")

    with within(30), pytest.raises(LookupError, match="mine"):
        guest.processes.exec(["sleep", "60"], stdin=broken())
    with within(30), pytest.raises(TypeError, match="binary mode"):
        guest.processes.exec(["sleep", "60"], stdin=["text"])  # type: ignore[list-item]


def test_a_stdin_that_blocks_does_not_hold_the_result(guest: RealGuest) -> None:
    reader, writer = os.pipe()
    try:
        with within(30), open(reader, "rb") as pipe:
            assert guest.processes.exec("echo done", stdin=pipe).text == "done\n"
            os.close(writer)
            writer = -1
            for thread in threading.enumerate():
                if thread.name == "stdin of a command":
                    thread.join(30)  # it leaves the pipe before that is closed under it
    finally:
        if writer >= 0:
            os.close(writer)


def test_output_comes_as_it_is_written(guest: RealGuest, tmp_path: Path) -> None:
    gate, seen = Gate(tmp_path), list[bytes]()

    def take(part: bytes) -> None:
        seen.append(part)
        gate.open()  # the command goes on once its first words have come

    result = guest.processes.exec(f"echo one; {gate.script}; echo two; echo three >&2", on_stdout=take, timeout=60)
    assert b"".join(seen) == result.stdout == b"one\ntwo\n"
    assert seen[0] == b"one\n"
    assert result.stderr == b"three\n"


def test_a_callback_that_fails_kills_the_command(guest: RealGuest, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def failing(part: bytes) -> None:
        raise ZeroDivisionError

    with within(30), pytest.raises(ZeroDivisionError):
        guest.processes.exec(f"echo x; {gate.script}; sleep 60", on_stdout=failing)
    gate.open()
    assert not gate.passed(0.3)


def test_too_much_output_is_an_error_unless_streamed(guest: RealGuest) -> None:
    with within(30), pytest.raises(GuestError, match="more than 1M") as caught:
        guest.processes.exec("yes", max_output=MIB)
    assert "max_output" in caught.value.hint
    total = 0

    def count(part: bytes) -> None:
        nonlocal total
        total += len(part)

    result = guest.processes.exec("head -c 3000000 /dev/zero", on_stdout=count, max_output=MIB)
    assert (total, result.truncated, len(result.stdout) <= MIB) == (3_000_000, True, True)


def test_timeout_kills_the_group_and_keeps_what_was_written(guest: RealGuest, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    for timeout in (0.3, 3, 10):  # a busy host may not have started the shell so soon
        with within(30), pytest.raises(ExecTimeout) as caught:
            guest.processes.exec(f"echo before; ({gate.script}) & sleep 60", timeout=timeout)
        if caught.value.stdout:
            break
    assert caught.value.stdout == b"before\n"
    gate.open()
    assert not gate.passed(0.3)
    assert guest.processes.exec("echo alive").text == "alive\n"


@pytest.mark.parametrize("script", ["yes", "yes >&2", "cat /dev/zero", "trap '' TERM; while :; do :; done"])
def test_timeout_of_a_command_that_never_rests(guest: RealGuest, script: str) -> None:
    with within(30), pytest.raises(ExecTimeout):
        guest.processes.exec(script, timeout=0.3, max_output=MIB, on_stdout=lambda b: None, on_stderr=lambda b: None)


def test_timeout_while_stdin_is_not_read(guest: RealGuest) -> None:
    with within(30), pytest.raises(ExecTimeout):
        guest.processes.exec("sleep 60", stdin=bytes(8 * MIB), timeout=0.3)


def test_ctrl_c_kills_the_command(guest: RealGuest, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with within(30), pytest.raises(KeyboardInterrupt):
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        guest.processes.exec(gate.script)
    gate.open()
    assert not gate.passed(0.3)


def test_many_at_once(guest: RealGuest) -> None:
    def one(number: int) -> bool:
        data = os.urandom(1000) * (number % 7) * 100
        return guest.processes.exec(["cat"], stdin=data, timeout=60).stdout == data

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(200)))


def test_a_slow_reader_holds_up_no_other(guest: RealGuest) -> None:
    with guest.processes.spawn("yes") as slow, within(30):
        assert slow.stdout.read(2) == b"y\n"
        for _ in range(20):
            assert guest.processes.exec("head -c 1000000 /dev/zero | wc -c").text.strip() == "1000000"


def test_spawn_pipes(guest: RealGuest) -> None:
    with guest.processes.spawn(["sh"]) as process:
        assert process.pid > 1
        process.stdin.write(b"echo out; echo err >&2\n")
        assert process.stdout.readline(timeout=30) == b"out\n"
        assert process.stderr.readline(timeout=30) == b"err\n"
        assert process.poll() is None
        process.stdin.write(b"exit 5\n")
        assert process.wait(30) == 5
        assert process.poll() == 5
        assert process.stdout.read() == b""
        with pytest.raises(BrokenPipeError):
            process.stdin.write(b"more")


def test_spawn_reads_as_a_file(guest: RealGuest) -> None:
    with guest.processes.spawn("printf 'a\\nbb\\nccc'") as process:
        assert list(process.stdout) == [b"a\n", b"bb\n", b"ccc"]
    process = guest.processes.spawn("seq 1 20000")
    with process, io.TextIOWrapper(io.BufferedReader(process.stdout)) as text:  # type: ignore[arg-type]
        assert [int(line) for line in text] == list(range(1, 20001))
    with guest.processes.spawn("printf abcdef") as process:
        assert [process.stdout.read(4), process.stdout.read(4), process.stdout.read(4)] == [b"abcd", b"ef", b""]


def test_spawn_wait_and_read_are_bounded(guest: RealGuest) -> None:
    with guest.processes.spawn(["sleep", "60"]) as process:
        with pytest.raises(TimeoutError):
            process.wait(0.05)
        with pytest.raises(TimeoutError):
            process.stdout.read(1, timeout=0.05)
        with pytest.raises(TimeoutError):
            process.stdin.write(bytes(MIB), timeout=0.05)
        process.kill(signal.SIGTERM)
        assert process.wait(30) == 143
        assert process.signal == 15


def test_spawn_64_mb_through_in_bounded_memory(guest: RealGuest) -> None:
    piece, pieces = os.urandom(MIB), 64
    with guest.processes.spawn(["cat"]) as process:

        def write() -> None:
            for _ in range(pieces):
                process.stdin.write(piece)
            process.stdin.close()

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        writer = threading.Thread(target=write)
        writer.start()
        size = 0
        while part := process.stdout.read(300_000):
            size += len(part)
        writer.join()
        assert size == pieces * MIB
        assert process.wait(30) == 0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


def test_leaving_the_block_kills(guest: RealGuest, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with guest.processes.spawn(gate.script):
        pass
    gate.open()
    assert not gate.passed(0.3)


def test_pty(guest: RealGuest) -> None:
    with guest.processes.spawn("stty size; tty; read x; stty size; echo got $x; exit 6", pty=True, size=(33, 101)) as process:
        assert process.stdout.readline(timeout=30) == b"33 101\r\n"
        assert process.stdout.readline(timeout=30).startswith(b"/dev/")
        process.resize(40, 120)
        process.stdin.write(b"word\n")
        rest = process.stdout.read(timeout=30)
        assert b"40 120\r\n" in rest
        assert b"got word\r\n" in rest
        assert process.wait(30) == 6
        assert process.stderr.read() == b""


def test_pty_ctrl_c_and_end_of_file(guest: RealGuest) -> None:
    with guest.processes.spawn(["cat"], pty=True) as process:
        process.stdin.write(b"\x03")
        assert process.wait(30) == 130
    with guest.processes.spawn(["cat"], pty=True) as process:
        process.stdin.write(b"x\n")
        process.stdin.close()
        assert process.wait(30) == 0


def test_detached_commands_outlive_their_process_object(guest: RealGuest, tmp_path) -> None:  # type: ignore[no-untyped-def]
    guest.processes.spawn(f"sleep 0.3; touch {tmp_path}/done", detach=True, stdin=False)
    deadline = time.monotonic() + 30
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ping_and_stats(guest: RealGuest) -> None:
    assert 0 < guest_verbs.ping(guest.line) < 5
    figures = guest_verbs.stats(guest.processes)
    assert figures["memory_total"] > figures["memory_free"] > 0
    assert figures["cpus"] >= 1


def test_steps_are_answered(guest: RealGuest) -> None:
    guest_verbs.configure(guest.line, [["env", "FROM_STEP=1"], ["sync"]])  # of the whole host: it may take long
    assert guest.processes.exec("echo $FROM_STEP").text == "1\n"
    with pytest.raises(GuestError, match="no-such-step"):
        guest_verbs.configure(guest.line, [["sync"], ["no-such-step"]])


def test_a_guest_that_dies_ends_everything() -> None:
    with real_guest() as guest:
        process = guest.processes.spawn(["sleep", "60"])
        failures = []

        def wait() -> None:
            try:
                guest.processes.exec(["sleep", "60"])
            except GuestGone as error:
                failures.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        guest.processes.exec("true")
        guest.process.kill()
        waiting.join(30)
        assert failures
        with pytest.raises(GuestGone):
            process.wait(30)
        with pytest.raises(GuestGone):
            process.stdout.read()
        with pytest.raises(GuestGone):
            guest.processes.exec("true")
        assert guest.line.closed
        assert guest.line.wait_closed(30)


def test_shutdown_closes_the_line() -> None:
    with real_guest() as guest:
        guest_verbs.shutdown(guest.line)
        assert guest.line.wait_closed(30)
