"""Keepers and their real engines: how a life begins, is watched and ends."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch_support import GUEST, Life, frame, gone, info, life, read_frame, script

from trivisor.core.errors import Busy, EngineError, StorageError
from trivisor.core.paths import MachineDir
from trivisor.core.process import start_time
from trivisor.launch import keeper, tvinit
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes

IDLE_ENGINE = "synced()\nwhile True:\n    next_frame()\n"


def test_a_whole_life(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        machine = one.machine
        assert keeper.alive(machine)
        pid, start = machine.keeper.read_text().split()
        assert (int(pid), int(start)) == (one.kept.keeper_pid, start_time(one.kept.keeper_pid))
        with one.connect() as line:
            facts = info(line)
        assert facts["keeper"] == pid and facts["engine"] == str(one.kept.engine_pid)
        assert facts["synced"] == "1" and facts["clients"] == "1" and int(facts["uptime_ms"]) >= 0
        assert keeper.ended(machine) is None
        before = time.time()
        keeper.stop(machine, grace=5, reason="stop", timeout=10)
        ended = keeper.ended(machine)
        assert ended is not None
        assert (ended.how, ended.value, ended.reason, ended.bye) == ("exited", 0, "stop", 0)
        assert before - 1 < ended.ended < time.time() + 1
        assert not keeper.alive(machine)
        assert gone(one.kept.keeper_pid) and gone(one.kept.engine_pid)
        assert not machine.line.exists()
        assert b"powering off" in machine.log("init").read_bytes()
    with life(tmp_path):  # and again in the same folder: the old record is no longer there
        assert keeper.ended(machine) is None


def test_the_keeper_is_small_and_alone(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        status = Path(f"/proc/{one.kept.keeper_pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0])
        assert resident < 1500, f"{resident} KiB"
        assert os.getsid(one.kept.keeper_pid) != os.getsid(0)
        open_files = [os.readlink(f"/proc/{one.kept.keeper_pid}/fd/{fd}") for fd in (0, 1, 2)]
        assert open_files == ["/dev/null"] * 3
        assert Path(f"/proc/{one.kept.keeper_pid}/cwd").readlink() == Path("/")
        engine_files = [os.readlink(entry) for entry in Path(f"/proc/{one.kept.engine_pid}/fd").iterdir()]
        assert not [name for name in engine_files if str(tmp_path) in name]


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


def test_kill_at_once_with_a_reason(tmp_path: Path) -> None:
    with life(tmp_path) as one, one.connect() as line:
        line.sendall(frame(0x42, 0, b"\6\0\0\0delete"))
        assert line.recv(1) == b""
        assert not keeper.alive(one.machine)  # the lock goes before the sockets
        ended = keeper.ended(one.machine)
        assert ended is not None
        assert (ended.how, ended.value, ended.reason, ended.bye) == ("signaled", 9, "delete", None)


def test_stop_kills_a_guest_that_does_not_listen(tmp_path: Path) -> None:
    with life(tmp_path, script("synced()\nwhile True: time.sleep(99)")) as one:
        began = time.monotonic()
        keeper.stop(one.machine, grace=0.3, reason="stop", timeout=10)
        assert 0.3 <= time.monotonic() - began < 5
        ended = keeper.ended(one.machine)
        assert ended is not None and (ended.how, ended.reason) == ("signaled", "stop")


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


def test_sigterm_ends_in_order(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        os.kill(one.kept.keeper_pid, signal.SIGTERM)
        ended = one.wait_end()
        assert ended is not None and (ended.how, ended.reason) == ("signaled", "keeper-term")


def test_a_killed_keeper_takes_its_processes_along(tmp_path: Path) -> None:
    helper = (("exec", "/bin/sleep", "99"),)
    with life(tmp_path, helpers={"network": helper}) as one:
        children = keeper._children(one.kept.keeper_pid)
        assert one.kept.engine_pid in children and len(children) == 2
        watched = [os.pidfd_open(pid) for pid in children]
        os.kill(one.kept.keeper_pid, signal.SIGKILL)
        keeper._wait_for(watched, time.monotonic() + 10)
        assert all(gone(pid) for pid in children)
        for fd in watched:
            os.close(fd)
        assert not keeper.alive(one.machine)
        assert keeper.ended(one.machine) is None
        keeper.kill(one.machine)
        assert not one.machine.line.exists()


def test_a_killed_keeper_takes_a_pid_namespace_along(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, for a pid namespace without a user namespace")
    engine = (("namespaces", "pid"), ("caps",), ("no-new-privs",), *GUEST)
    with life(tmp_path, engine) as one:
        watched = os.pidfd_open(one.kept.engine_pid)
        os.kill(one.kept.keeper_pid, signal.SIGKILL)
        keeper._wait_for([watched], time.monotonic() + 10)
        assert gone(one.kept.engine_pid)
        os.close(watched)


def test_kill_returns_when_all_are_gone(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        keeper.kill(one.machine)
        assert gone(one.kept.keeper_pid) and gone(one.kept.engine_pid)
        assert not keeper.alive(one.machine) and not one.machine.line.exists()
        keeper.kill(one.machine)  # nothing to do


def test_a_reused_pid_is_not_killed(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path)
    with subprocess.Popen(["/bin/sleep", "99"]) as other:
        start = start_time(other.pid)
        assert start is not None
        machine.keeper.write_text(f"{other.pid} {start + 1}\n")
        keeper.kill(machine)
        assert other.poll() is None
        other.kill()


def test_helpers_start_first_and_end_with_the_engine(tmp_path: Path) -> None:
    helper = (("exec", "/bin/sleep", "99"),)
    with life(tmp_path, helpers={"a": helper, "b": helper}) as one:
        children = keeper._children(one.kept.keeper_pid)
        assert len(children) == 3 and max(children) == one.kept.engine_pid
        os.kill(one.kept.engine_pid, signal.SIGTERM)
        one.wait_end()
        assert all(gone(pid) for pid in children)


def test_the_owners_death_ends_the_machine(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "99"]) as owner, life(tmp_path, owner=owner.pid) as one:
        owner.kill()
        ended = one.wait_end()
        assert ended is not None and ended.reason == "owner"


def test_an_owner_that_died_before(tmp_path: Path) -> None:
    owner = subprocess.Popen(["/bin/true"])
    owner.wait()
    with pytest.raises(EngineError, match="has ended"), life(tmp_path, owner=owner.pid):
        pass
    assert not keeper.alive(MachineDir(tmp_path))


def test_a_starter_that_dies_leaves_nothing(tmp_path: Path) -> None:
    """Killed while the guest has not answered yet: nobody would ever finish this start."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from launch_support import life, script
with life(Path({str(tmp_path)!r}), script("time.sleep(99)"), wait=90):
    pass
"""
    machine = MachineDir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        deadline = time.monotonic() + 20
        while not machine.keeper.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        pid = int(machine.keeper.read_text().split()[0])
        watched = os.pidfd_open(pid)
        starter.kill()
    keeper._wait_for([watched], time.monotonic() + 10)
    os.close(watched)
    assert not keeper.alive(machine)
    ended = keeper.ended(machine)
    assert ended is None or ended.reason == "abandoned"


def test_time_limits(tmp_path: Path) -> None:
    for name, options in (("ttl", {"ttl": 0.4}), ("idle", {"idle": 0.4})):
        folder = tmp_path / name
        folder.mkdir()
        with life(folder, **options) as one:
            began = time.monotonic()
            ended = one.wait_end()
            assert 0.2 < time.monotonic() - began < 5
            assert ended is not None
            assert (ended.reason, ended.how, ended.bye) == (name, "exited", 0)


def test_traffic_is_not_idle_and_questions_are(tmp_path: Path) -> None:
    with life(tmp_path, idle=0.6) as one, one.connect() as line, one.connect() as asking:
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            line.sendall(frame(0x0C, 1))
            assert read_frame(line)[0] == 0x0D
            time.sleep(0.05)
        assert keeper.alive(one.machine)
        began = time.monotonic()
        with contextlib.suppress(OSError, AssertionError):
            while time.monotonic() - began < 5:
                info(asking)
                time.sleep(0.05)
        assert time.monotonic() - began < 3
        ended = one.wait_end()
        assert ended is not None and ended.reason == "idle"


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


def test_failures_say_why(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path)
    with pytest.raises(EngineError, match=r"/nowhere/qemu.*No such file"), life(tmp_path, (("exec", "/nowhere/qemu"),)):
        pass
    with (
        pytest.raises(EngineError, match="ended before the guest answered: it broke") as caught,
        life(tmp_path, script("sys.stderr.write('first\\nit broke\\n')")),
    ):
        pass
    assert "first\nit broke" in caught.value.output and "engine.log" in caught.value.hint
    with pytest.raises(EngineError, match=r"did not answer within 0\.3 s"), life(tmp_path, script("time.sleep(99)"), wait=0.3):
        pass
    with pytest.raises(EngineError, match="version 7"), life(tmp_path, script("synced(7)\ntime.sleep(99)")):
        pass
    assert not keeper.alive(machine) and not machine.line.exists()
    with pytest.raises(StorageError, match="cannot be used"), life(tmp_path / "missing"):
        pass


def test_one_keeper_a_machine(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        plan = (("exec", "/bin/true"),)
        with pytest.raises(Busy):
            keeper.spawn(one.machine, processes=[keeper.Process("e", plan)], line_fd=0, logs={}, fds=[])
        assert keeper.alive(one.machine)
        with one.connect() as line:
            assert info(line)["synced"] == "1"


def test_a_long_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    with life(deep) as one:
        keeper.stop(one.machine, grace=5, reason="stop", timeout=10)
        assert keeper.ended(one.machine) is not None
        assert not one.machine.line.exists()


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path)
    with keeper._open_alive(machine, os.O_RDWR | os.O_CREAT) as fd:
        keeper._lock_alive(machine, fd)
        release, hold = os.pipe()
        ready, running = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(hold)
            os.write(running, b"x")
            os.read(release, 1)
            os._exit(0)
        os.close(release)
        os.read(ready, 1)
    assert not keeper.alive(machine)
    for end in (hold, ready, running):
        os.close(end)
    os.waitpid(pid, 0)


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
        before = cpu_seconds(one.kept.keeper_pid)
        began = time.monotonic()
        while time.monotonic() - began < 2:
            with one.connect() as line:
                assert int(info(line)["engine"]) == one.kept.engine_pid
            time.sleep(0.1)
        assert cpu_seconds(one.kept.keeper_pid) - before < 0.5
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
        ended = keeper.ended(one.machine)
        assert ended is not None
        assert (ended.how, ended.value, ended.bye, ended.reason) == ("exited", 3, 5, "")


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path)
    machine.exit.write_text("how=exited\nvalue=many\n")
    with pytest.raises(StorageError, match="damaged"):
        keeper.ended(machine)


def test_tvinit_is_what_it_says() -> None:
    assert len(tvinit.digest()) == 64 and tvinit.path().is_file()
    for arguments in ([], ["x"], ["99999"]):
        assert subprocess.run([tvinit.path(), "keep", *arguments], capture_output=True, check=False).returncode in (1, 2)


def test_spawning_is_quick(tmp_path: Path) -> None:
    """Start to a guest that answered: a few milliseconds, of which none is waiting."""
    times = []
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        began = time.monotonic()
        with life(folder):
            times.append(time.monotonic() - began)
    assert min(times) < 0.1, times


def test_lives(tmp_path: Path) -> None:
    """Many at once, from many threads."""
    failures: list[BaseException] = []

    def one_life(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            with life(folder) as one:
                assert isinstance(one, Life)
                keeper.stop(one.machine, grace=5, reason="stop", timeout=20)
                ended = keeper.ended(one.machine)
                assert ended is not None and ended.bye == 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one_life, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
