"""Keepers between their clients and guests that misbehave: nobody else suffers, and nothing grows without bound."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from launch_support import frame, info, life, read_frame, script

from trivisor.core.paths import MachineDir
from trivisor.launch import keeper
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes


def test_many_clients_at_once(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        said: dict[int, str] = {}

        def work(number: int) -> None:
            line = Line.connect(one.machine.line, "m")
            try:
                processes = Processes(lambda: line, "m", {})
                said[number] = processes.exec(["sh", "-c", f"head -c 300000 /dev/zero | wc -c; echo {number}"]).text
            finally:
                line.close()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert said == {number: f"300000\n{number}\n" for number in range(12)}


def test_too_many_clients_are_turned_away(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with life(tmp_path) as one, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(one.connect()) for _ in range(256)]
        assert info(lines[-1])["clients"] == "256"
        with one.connect() as extra:
            assert extra.recv(1) == b""
        lines[0].close()
        while True:  # until the keeper has seen that
            with one.connect() as extra, contextlib.suppress(OSError):
                extra.sendall(frame(0x40))
                if extra.recv(12):
                    break
        assert info(lines[-1])["engine"] == str(one.kept.engine_pid)


@pytest.mark.parametrize("bad", [b"GET / HTTP/1.0\r\n", frame(0x01, 0, bytes(20)), frame(0x0C, 0x10000), frame(0x42, 0, b"x"), frame(0x0A)])
def test_a_malformed_client_is_closed_and_no_other(tmp_path: Path, bad: bytes) -> None:
    with life(tmp_path) as one, one.connect() as good, one.connect() as line:
        line.sendall(bad)
        with contextlib.suppress(ConnectionResetError):
            assert line.recv(1) == b""
        good.sendall(frame(0x0C, 3, b"ping"))
        assert read_frame(good) == (0x0D, 3, b"ping")


def test_stop_works_while_the_line_is_blocked(tmp_path: Path) -> None:
    with life(tmp_path, script("synced()\nwhile True: time.sleep(99)")) as one, one.connect() as line:
        line.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while True:
                line.sendall(frame(0x0C, 0, bytes(32768)))
        with one.connect() as other:
            assert info(other)["synced"] == "1"
        keeper.stop(one.machine, grace=0.1, reason="stop", timeout=10)
        ended = keeper.ended(one.machine)
        assert ended is not None and ended.reason == "stop"


def test_what_a_client_sends_before_the_guest_answers_waits(tmp_path: Path) -> None:
    """...but a question to the keeper itself does not."""
    machine = MachineDir(tmp_path)
    failures: list[BaseException] = []
    engine = script("""
import os
while not os.path.exists('%s'): time.sleep(0.01)
synced()
os.write(3, frame(0x0D, next_frame()[1]))
time.sleep(99)""")
    go = tmp_path / "go"
    plan = (*engine[:-1], (*engine[-1][:-1], engine[-1][-1] % go))

    def client() -> None:
        try:
            while not machine.keeper.exists():
                time.sleep(0.005)
            with socket.socket(socket.AF_UNIX) as line, socket.socket(socket.AF_UNIX) as early:
                for each in (line, early):
                    each.settimeout(10)
                    each.connect(str(machine.line))
                assert info(line)["synced"] == "0"
                early.sendall(frame(0x0C, 4))
                assert info(line)["synced"] == "0"
                go.touch()
                assert read_frame(early)[:2] == (0x0D, 4)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    with life(tmp_path, plan):
        thread.join(20)
    assert not failures


def test_logs_are_capped(tmp_path: Path) -> None:
    cap = 100_000
    reader, writer = os.pipe()
    engine = script("""
import sys
synced()
for i in range(300):
    sys.stderr.write('x' * 999 + '\\n')
    os.write(3, frame(6, 0, b'y' * 999 + b'\\n'))
next_frame()
""")
    with life(tmp_path, engine, serial=reader, log_cap=cap) as one:
        os.close(reader)
        for _ in range(250):
            os.write(writer, b"s" * 999 + b"\n")
        os.write(writer, b"the last\n")
        os.close(writer)
        keeper.stop(one.machine, grace=5, reason="stop", timeout=10)
        for name in ("engine", "init", "serial"):
            log = one.machine.log(name)
            old = Path(f"{log}.1")
            assert 0 < log.stat().st_size <= cap
            assert old.stat().st_size <= cap
        assert one.machine.log("serial").read_bytes().endswith(b"the last\n")


def test_a_full_disk_costs_log_lines_only(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", small], check=True)
    try:
        engine = script("""
import sys
synced()
sys.stderr.write('x' * 2000000)
sys.stderr.flush()
while True:
    next_frame()
""")
        with life(small, engine) as one:
            with one.connect() as line:
                assert info(line)["synced"] == "1"
            while os.statvfs(small).f_bavail:
                time.sleep(0.01)
            keeper.stop(one.machine, grace=0.1, reason="stop", timeout=10)
            ended = keeper.ended(one.machine)
            assert ended is not None and ended.reason == "stop"  # its own logs made room for that
    finally:
        subprocess.run(["umount", small], check=True)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


GARBAGE = """
synced()
import random, threading
def answer():
    while True:
        try:
            synced()
        except SystemExit:
            os._exit(9)
threading.Thread(target=answer, daemon=True).start()
noise = random.Random(1).randbytes(1 << 16)
while True:
    os.write(line, noise)
"""


def test_garbage_from_the_guest_costs_little(tmp_path: Path) -> None:
    """A guest root that writes random bytes for ever, while its tvinit goes on answering SYNC."""
    with life(tmp_path, script(GARBAGE)) as one:
        began = time.monotonic()
        before = cpu_seconds(one.kept.keeper_pid)
        while time.monotonic() - began < 2:
            with one.connect() as line:
                assert int(info(line)["engine"]) == one.kept.engine_pid
            time.sleep(0.1)
        assert cpu_seconds(one.kept.keeper_pid) - before < 0.25 * (time.monotonic() - began)
        status = Path(f"/proc/{one.kept.keeper_pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 2500
        keeper.stop(one.machine, grace=0.1, reason="stop", timeout=10)


def test_a_malformed_frame_closes_the_clients_and_the_line_comes_back(tmp_path: Path) -> None:
    engine = script("""
synced()
next_frame()
os.write(3, b'garbage')
synced()
while True:
    kind, stream, data = next_frame()
    if kind == 0x0C:
        os.write(3, frame(0x0D, stream, data))
""")
    with life(tmp_path, engine) as one, one.connect() as line, one.connect() as silent:
        line.sendall(frame(0x0C, 1))
        assert line.recv(1) == b""
        silent.sendall(frame(0x0C, 2, b"again"))  # it had no stream that was lost
        assert read_frame(silent) == (0x0D, 2, b"again")


def test_a_guest_cannot_speak_for_the_keeper(tmp_path: Path) -> None:
    engine = script("""
synced()
_, stream, _ = next_frame()
os.write(3, frame(0x41, stream, b'engine=1\\n'))
synced()
time.sleep(99)
""")
    with life(tmp_path, engine) as one, one.connect() as line:
        line.sendall(frame(0x0C, 1))
        assert line.recv(100) == b""


def test_a_guest_that_ignores_windows_does_not_grow_the_keeper(tmp_path: Path) -> None:
    engine = script("""
synced()
_, stream, _ = next_frame()
data = frame(0x13, stream, b'\\1' + bytes(32000))
while True:
    os.write(3, data)
""")
    with life(tmp_path, engine) as one, one.connect() as line, one.connect() as other:
        line.sendall(frame(0x0C, 1))  # and then reads nothing
        time.sleep(1)
        status = Path(f"/proc/{one.kept.keeper_pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 16 * 1024
        assert info(other)["clients"] == "2"
        # A client that takes nothing while it holds up the line is closed after a while.
        deadline = time.monotonic() + 20
        while info(other)["clients"] == "2" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert info(other)["clients"] == "1"


def test_a_client_that_leaves_is_told_to_the_guest(tmp_path: Path) -> None:
    engine = script("synced()\nsys.stderr.write(repr([next_frame()[:2] for _ in range(3)]))\n")
    with life(tmp_path, engine) as one:
        with one.connect() as line, one.connect() as unheard:
            info(unheard)
            line.sendall(frame(0x0C, 1) + frame(0x0C, 2))
            while int(info(unheard)["clients"]) != 2:
                pass
        one.wait_end()
        assert one.machine.log("engine").read_text() == "[(12, 65537), (12, 65538), (3, 65536)]"


def test_an_engines_last_words_reach_its_client(tmp_path: Path) -> None:
    engine = script("""
synced()
_, stream, _ = next_frame()
os.write(3, frame(0x0D, stream, b'last') + frame(7, 0, b'\\5\\0\\0\\0'))
sys.exit(3)
""")
    with life(tmp_path, engine) as one, one.connect() as line:
        line.sendall(frame(0x0C, 1))
        assert read_frame(line) == (0x0D, 1, b"last")
        assert read_frame(line) == (0, 0, b"")
        ended = one.wait_end()  # which comes first, but for an engine that takes over a second to end after its line
        assert ended is not None
        assert (ended.how, ended.value, ended.bye, ended.reason) == ("exited", 3, 5, "")
