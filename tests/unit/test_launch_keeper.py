"""Keepers and their real engines: how a life begins, is watched and ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch_support import GUEST, Life, frame, gone, in_child, info, life, read_frame, script

from trivisor.core.errors import Busy, EngineError, StorageError
from trivisor.core.paths import MachineDir
from trivisor.core.process import start_time
from trivisor.launch import ending, keeper, tvinit
from trivisor.launch.alive import lock_alive, open_alive


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


def test_sigterm_ends_in_order(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        os.kill(one.kept.keeper_pid, signal.SIGTERM)
        ended = one.wait_end()
        assert ended is not None and (ended.how, ended.reason) == ("signaled", "keeper-term")


def test_a_killed_keeper_takes_its_processes_along(tmp_path: Path) -> None:
    helper = (("exec", "/bin/sleep", "99"),)
    with life(tmp_path, helpers={"network": helper}) as one:
        children = ending.children(one.kept.keeper_pid)
        assert one.kept.engine_pid in children and len(children) == 2
        watched = [os.pidfd_open(pid) for pid in children]
        os.kill(one.kept.keeper_pid, signal.SIGKILL)
        ending.wait_for(watched, time.monotonic() + 10)
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
        ending.wait_for([watched], time.monotonic() + 10)
        assert gone(one.kept.engine_pid)
        os.close(watched)


def test_kill_returns_when_all_are_gone(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        keeper.kill(one.machine)
        assert gone(one.kept.keeper_pid) and gone(one.kept.engine_pid)
        assert not keeper.alive(one.machine) and not one.machine.line.exists()
        keeper.kill(one.machine)  # nothing to do


def test_who_ignores_the_end_of_children_starts_machines_too(tmp_path: Path) -> None:
    def work() -> str:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            with life(tmp_path / str(number)) as one:
                assert keeper.alive(one.machine)
        return "done"

    assert in_child(work) == "done"


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
        children = ending.children(one.kept.keeper_pid)
        assert len(children) == 3 and children[-1] == one.kept.engine_pid  # they are in the order of their birth
        os.kill(one.kept.engine_pid, signal.SIGTERM)
        one.wait_end()
        assert all(gone(pid) for pid in children)


def test_the_owners_death_ends_the_machine(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "99"]) as owner, life(tmp_path, owner=owner.pid) as one:
        owner.kill()
        ended = one.wait_end()
        assert ended is not None and ended.reason == "owner"


def test_the_end_of_its_memory_ends_the_machine(tmp_path: Path) -> None:
    told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with life(tmp_path, oom=told) as one:
            assert keeper.alive(one.machine)
            os.eventfd_write(told, 1)
            ended = one.wait_end()
            assert ended is not None and (ended.reason, ended.how) == ("out of memory", "signaled")
    finally:
        os.close(told)


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
    ending.wait_for([watched], time.monotonic() + 10)
    os.close(watched)
    assert not keeper.alive(machine)
    ended = keeper.ended(machine)
    assert ended is None or ended.reason == "abandoned"


def test_time_limits(tmp_path: Path) -> None:
    """Both at once; the time begins with the keeper, and is enough for a guest that answers late."""
    names = ("ttl", "idle")
    for name in names:
        (tmp_path / name).mkdir()
    began = time.monotonic()
    with life(tmp_path / "ttl", ttl=1.5) as one, life(tmp_path / "idle", idle=1.5) as other:
        for name, each in zip(names, (one, other), strict=True):
            ended = each.wait_end(30)
            assert time.monotonic() - began >= 1.5
            assert ended is not None
            assert (ended.reason, ended.how, ended.bye) == (name, "exited", 0)


def test_traffic_is_not_idle_and_questions_are(tmp_path: Path) -> None:
    with life(tmp_path, idle=1.2) as one, one.connect() as line, one.connect() as asking:
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            line.sendall(frame(0x0C, 1))
            assert read_frame(line)[0] == 0x0D
            time.sleep(0.05)
        assert keeper.alive(one.machine)
        began = time.monotonic()
        with contextlib.suppress(OSError, AssertionError):
            while time.monotonic() - began < 30:
                info(asking)
                time.sleep(0.05)
        assert time.monotonic() - began < 30
        ended = one.wait_end()
        assert ended is not None and ended.reason == "idle"


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
    with open_alive(machine, os.O_RDWR | os.O_CREAT) as fd:
        lock_alive(machine, fd)
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


def test_who_only_looks_is_waited_for_however_long_it_takes(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path)
    with open_alive(machine, os.O_RDWR | os.O_CREAT) as looking, open_alive(machine, os.O_RDWR) as fd:
        fcntl.flock(looking, fcntl.LOCK_SH)
        late = threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN))
        late.start()
        lock_alive(machine, fd)
        late.join()
        with open_alive(machine, os.O_RDWR) as other, pytest.raises(Busy):
            lock_alive(machine, other)


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
