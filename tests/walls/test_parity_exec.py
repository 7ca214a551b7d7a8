"""Commands in a real machine: what they are given, what comes back, how they end, many at once."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from machine_home import VmHome, in_child

from trivisor import VMM, ExecFailed, ExecTimeout, GuestError, InvalidSpec, Machine, State

MIB = 1 << 20
BOUND = 60.0
"""Seconds that no command here comes near."""


def test_output_and_status(running: Machine) -> None:
    result = running.exec(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout=BOUND)
    assert (result.stdout, result.stderr, result.exit_code, result.signal, result.ok) == (b"out\n", b"err\n", 3, None, False)
    assert result.duration > 0
    assert result.peak_memory > 0


def test_a_text_is_a_line_for_sh(running: Machine) -> None:
    assert running.exec("for i in 1 2 3; do echo $i; done | sort -r | head -n 1", check=True).text == "3\n"


def test_bytes_come_through_as_they_are(running: Machine) -> None:
    every = bytes(range(256)) * 100
    assert running.exec(["cat"], stdin=every, timeout=BOUND).stdout == every


def test_streamed(running: Machine) -> None:
    """Each line is there before the next is written: the command waits for a file that the callback's reader makes."""
    seen: list[bytes] = []

    def on_stdout(part: bytes) -> None:
        seen.append(part)
        if b"first" in b"".join(seen) and len(seen) == 1:
            running.files.write("/tmp/go-on", b"")

    result = running.exec("echo first; while [ ! -e /tmp/go-on ]; do sleep 0.02; done; echo second", on_stdout=on_stdout, timeout=BOUND)
    assert b"".join(seen) == b"first\nsecond\n" == result.stdout
    assert len(seen) > 1


def test_what_a_callback_raises_comes_out_and_kills(running: Machine) -> None:
    def on_stdout(part: bytes) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        running.exec("echo $$ >/tmp/raised; echo hello; exec sleep 1000", on_stdout=on_stdout, timeout=BOUND)
    gone(running, running.files.read_text("/tmp/raised").strip())


def test_environment(running: Machine) -> None:
    lines = running.exec(["env"], env={"MINE": "a b\nc", "HOME": "/tmp"}).text.split("\n")
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert found["MINE"] == "a b"
    assert found["FROM_SPEC"] == "spec"
    assert found["HOME"] == "/tmp"
    assert found["USER"] == "root"
    assert "/usr/bin" in found["PATH"]
    assert running.exec("echo $FROM_SPEC", env={"FROM_SPEC": "exec"}).text == "exec\n"


def test_working_folder(running: Machine) -> None:
    assert running.exec(["pwd"]).text == "/root\n"
    assert running.exec(["pwd"], cwd="/var/tmp").text == "/var/tmp\n"
    with pytest.raises(GuestError, match="/no/such"):
        running.exec(["pwd"], cwd="/no/such")


def test_user(running: Machine) -> None:
    assert running.exec(["id", "-u"]).text == "0\n"
    assert running.exec("id -un; id -gn; id -G; echo $HOME", user="nobody").text == "nobody\nnogroup\n65534\n/nonexistent\n"
    assert running.exec("id -u; id -g", user="1234:2345").text == "1234\n2345\n"
    assert running.exec(["cat", "/etc/shadow"], user="nobody").exit_code == 1
    with pytest.raises(GuestError, match="whoever"):
        running.exec(["id"], user="whoever")


def test_no_such_program_is_127(running: Machine) -> None:
    for argv in (["no-such-program"], ["/no/such/program"]):
        result = running.exec(argv)
        assert result.exit_code == 127
        assert "no" in result.error_text


def test_what_cannot_be_executed_is_126(running: Machine) -> None:
    running.files.write("/tmp/plain", b"#!/bin/sh\necho no\n", mode=0o644)
    for argv in (["/tmp/plain"], ["/etc"]):
        result = running.exec(argv)
        assert result.exit_code == 126
        assert result.stderr


def test_killed_by_a_signal(running: Machine) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        result = running.exec(f"kill -{int(number)} $$")
        assert (result.exit_code, result.signal) == (128 + number, number)


def test_check(running: Machine) -> None:
    with pytest.raises(ExecFailed, match="exit status 4: because") as caught:
        running.exec("echo because >&2; exit 4", check=True)
    assert caught.value.result.exit_code == 4  # type: ignore[attr-defined]
    assert caught.value.machine == running.name


def test_not_a_command(running: Machine) -> None:
    for argv in ([], [""], [1], ["a\0b"]):
        with pytest.raises((InvalidSpec, ValueError)):
            running.exec(argv)  # type: ignore[arg-type]


def test_timeout_kills_the_group_and_the_machine_lives(running: Machine) -> None:
    timed_out(running, "echo $$; sleep 1000 & echo $!; sh -c 'sleep 1000 & echo $!; wait'", says=3)
    assert running.exec(["echo", "alive"]).text == "alive\n"
    assert running.state is State.RUNNING


def test_a_command_that_ignores_sigterm_is_killed_too(running: Machine) -> None:
    timed_out(running, "trap '' TERM INT HUP; echo $$; while :; do sleep 0.1; done", says=1)


def timed_out(machine: Machine, script: str, *, says: int) -> None:
    """Have a script run into its timeout, once it has said the pids of its processes: all of them end."""
    for timeout in (1, 5, 30):  # a busy host may take more than the first for it to say anything
        with pytest.raises(ExecTimeout) as caught:
            machine.exec(script, timeout=timeout)
        pids = caught.value.stdout.split()
        for pid in pids:
            gone(machine, pid.decode())
        if len(pids) == says:
            return
    raise AssertionError(pids)


def test_background_children_do_not_hold_exec_up(running: Machine) -> None:
    """As with docker exec: the end of the command is its end, whoever still has its pipes."""
    result = running.exec("sleep 1000 & echo $!", timeout=BOUND)
    assert result.exit_code == 0
    running.exec(f"kill -9 {result.text.strip()}", check=True)


@pytest.mark.timeout(300)
def test_much_stdin(running: Machine) -> None:
    """64 MB in, as one value and as a stream that is made on the way."""
    piece = os.urandom(MIB)
    whole = piece * 64
    digest = hashlib.sha256(whole).hexdigest()
    assert running.exec(["sha256sum"], stdin=whole).text.split()[0] == digest

    def stream() -> Iterator[bytes]:
        for _ in range(64):
            yield piece

    assert running.exec(["wc", "-c"], stdin=stream()).text == f"{64 * MIB}\n"


@pytest.mark.timeout(300)
def test_much_stdout(running: Machine) -> None:
    """64 MB out, kept, and the same through a callback that keeps nothing."""
    command = f"head -c {64 * MIB} /dev/zero"
    result = running.exec(command)
    assert result.stdout == bytes(64 * MIB)
    sizes: list[int] = []
    result = running.exec(command, on_stdout=lambda part: sizes.append(len(part)), max_output=0)
    assert sum(sizes) == 64 * MIB
    assert result.stdout == b""


def test_more_output_than_is_kept_is_an_error(running: Machine) -> None:
    with pytest.raises(GuestError):
        running.exec(["yes"], max_output=MIB, timeout=BOUND)
    assert running.exec(["true"]).ok


def test_many_at_once_from_many_threads(running: Machine) -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = running.exec(["cat"], stdin=f"{number}\n" * 1000, timeout=BOUND).text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert results == {number: f"{number}\n" * 1000 for number in range(24)}


def test_many_at_once_from_many_processes(running: Machine, wall_home: VmHome) -> None:
    def work() -> None:
        with VMM(wall_home.root) as vmm:
            machine = vmm.get(running.id)
            for _ in range(4):
                me = f"{os.getpid()}\n"
                assert machine.exec(["cat"], stdin=me, timeout=BOUND).text == me

    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(in_child(work))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert statuses == [0] * 4


def test_a_forked_child_uses_its_parents_machine(running: Machine) -> None:
    running.exec(["true"])

    def work() -> None:
        assert running.exec(["echo", "child"]).text == "child\n"
        assert running.state is State.RUNNING

    assert in_child(work) == 0
    assert running.exec(["echo", "parent"]).text == "parent\n"


def test_spawn_with_pipes(running: Machine) -> None:
    with running.spawn("while read line; do echo got $line; echo err >&2; done; exit 5") as process:
        process.stdin.write(b"one\n")
        assert process.stdout.readline(timeout=BOUND) == b"got one\n"
        assert process.poll() is None
        process.stdin.write(b"two\n")
        process.stdin.close()
        assert process.stdout.read(timeout=BOUND) == b"got two\n"
        assert process.wait(BOUND) == 5
        assert process.stderr.read() == b"err\nerr\n"


def test_spawned_commands_get_signals(running: Machine) -> None:
    with running.spawn("trap 'echo usr1; exit 7' USR1; echo ready; while :; do sleep 0.05; done") as process:
        assert process.stdout.readline(timeout=BOUND) == b"ready\n"
        process.kill(signal.SIGUSR1, group=False)
        assert process.stdout.readline(timeout=BOUND) == b"usr1\n"
        assert process.wait(BOUND) == 7
    with running.spawn(["sleep", "1000"]) as process:
        process.kill()
        assert process.wait(BOUND) == 137
        assert process.signal == 9


def test_spawned_commands_end_with_their_block(running: Machine) -> None:
    with running.spawn(["sleep", "1000"]) as process:
        pid = str(process.pid)
        assert running.exec(f"kill -0 {pid}").ok
    gone(running, pid)


def test_commands_end_with_the_process_that_ran_them(running: Machine, wall_home: VmHome) -> None:
    """Killed with -9; but a detached one goes on."""

    def work() -> None:
        with VMM(wall_home.root) as vmm:
            machine = vmm.get(running.id)
            tied, free = machine.spawn(["sleep", "1000"]), machine.spawn(["sleep", "1000"], detach=True)
            machine.files.write_text("/tmp/pids", f"{tied.pid} {free.pid}")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    tied, free = running.files.read_text("/tmp/pids").split()
    gone(running, tied)
    assert running.exec(f"kill -9 {free}").ok


def test_terminal(running: Machine) -> None:
    with running.spawn(["sh"], pty=True, size=(30, 100), env={"PS1": "", "TERM": "vt100"}) as process:
        process.stdin.write(b"stty size; tty; echo $TERM\n")
        seen = until(process.stdout.read, b"vt100\r\n")
        assert b"30 100\r\n" in seen
        assert b"/dev/pts/" in seen
        process.resize(41, 123)
        process.stdin.write(b"stty size\n")
        until(process.stdout.read, b"41 123\r\n")
        # Ctrl-C reaches what is in the foreground, and not the shell.
        process.stdin.write(b"sh -c 'echo beg''un; exec sleep 1000'\n")
        until(process.stdout.read, b"begun\r\n")
        process.stdin.write(b"\x03")
        process.stdin.write(b"echo still; exit 9\n")
        until(process.stdout.read, b"still\r\n")
        assert process.wait(BOUND) == 9


def test_zombies_are_reaped(running: Machine) -> None:
    """PID 1 takes in orphans: a hundred daemons leave nothing."""
    running.exec("for i in $(seq 100); do (sleep 0 &); done", check=True, timeout=BOUND)
    deadline = time.monotonic() + BOUND
    while b"Z" in (states := running.exec("cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' | cut -c1").stdout):
        assert time.monotonic() < deadline, states


def until(read: object, wanted: bytes) -> bytes:
    """Read a terminal until it has printed `wanted`."""
    seen = b""
    while wanted not in seen:
        part = read(4096, timeout=BOUND)  # type: ignore[operator]
        assert part, seen
        seen += part
    return seen


def gone(machine: Machine, pid: str) -> None:
    """Assert that the process is no more, or soon so: a killed one falls when the guest's kernel gets to it."""
    deadline = time.monotonic() + BOUND
    while machine.exec(f"grep -q '^State:.[^Z]' /proc/{pid}/status 2>/dev/null").ok:
        assert time.monotonic() < deadline
