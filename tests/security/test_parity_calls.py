"""A hostile program (calls.c) under a policy: it gets neither more than it could have by itself, nor more than the policy allows."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from trivisor import Machine, Policy
from trivisor.vos.syscalls.call import Call

pytestmark = pytest.mark.walls("container", "vm")
PLACE = "/bin/calls"
FILES = (
    "/proc/sysvipc/shm", "/proc/sys/kernel/shmmax", "/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "/proc/net/dev",
    "/proc/mounts", "/proc/self/comm", "/proc/thread-self/comm", "/proc/self/cgroup", "/proc/self/fd/5", "/dev/fd/5",
    "/proc/self/fd/999", "/etc/hostname", "../../../etc/hostname", "/../../etc/hostname",
)  # fmt: skip
OUTSIDE = ("/proc/1/root/etc/shadow", "/proc/self/root/etc/shadow", "/proc/self/cwd", "/proc/1/fd/3", "/proc/1/cwd/etc")


@pytest.fixture(scope="module")
def hostile(running: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine in which that program lies."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    program = tmp_path_factory.mktemp("calls") / "calls"
    source = Path(__file__).with_name("calls.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", program, source], check=True)
    running.files.write(PLACE, program.read_bytes(), mode=0o755)
    return running


def calls(machine: Machine, *words: str, policy: Policy | None = None) -> str:
    done = machine.exec([PLACE, *words], policy=policy, timeout=60)
    assert done.exit_code == 0, (done.text, done.error_text)
    return done.text


def opening() -> Policy:
    """All is opened by the answerer."""
    policy = Policy()

    @policy.on("open", "openat")
    def opened(call: Call) -> None:
        call.open()

    return policy


@pytest.fixture
def shared_memory() -> Iterator[int]:
    """A System V segment of the host's; its key."""
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x7A << 24 | os.getpid()
    number = libc.shmget(key, 4096, 0o1600)
    if number < 0:
        pytest.skip(f"needs System V shared memory: {os.strerror(ctypes.get_errno())}")
    yield key
    libc.shmctl(number, 0, None)


def test_what_is_opened_on_behalf_is_what_the_program_would_open(hostile: Machine, shared_memory: int) -> None:
    assert str(shared_memory) in Path("/proc/sysvipc/shm").read_text()
    alone = calls(hostile, "see", *FILES)
    assert str(shared_memory) not in alone
    assert calls(hostile, "see", *FILES, policy=opening()) == alone


def test_links_of_proc_lead_nowhere_on_behalf(hostile: Machine) -> None:
    for line in calls(hostile, "see", *OUTSIDE, policy=opening()).splitlines():
        assert not line.startswith("root:")
        if line.startswith("== "):
            assert line.split(" ")[2] in ("ELOOP", "EACCES", "EISDIR"), line


def test_on_behalf_of_a_program_with_a_root_of_its_own(hostile: Machine) -> None:
    hostile.exec("mkdir -p /tmp/jail/etc && echo jailed > /tmp/jail/etc/hostname && ln -sf /etc/shadow /tmp/jail/leads")
    words = ("see", "-r", "/tmp/jail", "/etc/hostname", "/../../etc/hostname", "/leads", "leads", "/bin/calls")
    alone = calls(hostile, *words)
    assert alone.count("jailed") == 2
    assert calls(hostile, *words, policy=opening()) == alone


def test_a_path_that_changes_while_it_is_looked_at(hostile: Machine) -> None:
    policy = Policy()

    @policy.on("open", "openat")
    def opened(call: Call) -> None:
        if call.path() == "/tmp/race/evil":
            call.errno(errno.EACCES)
        else:
            call.open()

    hostile.exec("mkdir -p /tmp/race && printf good > /tmp/race/good && printf evil > /tmp/race/evil")
    assert calls(hostile, "flip", policy=policy).endswith("evil 0\n")


@pytest.mark.walls("container")
def test_mounts_on_behalf_unmask_nothing(hostile: Machine) -> None:
    policy = Policy()

    @policy.on("mount")
    def mounted(call: Call) -> None:
        call.mount()

    said = dict(line.split(" ") for line in calls(hostile, "mounts", policy=policy).splitlines())
    assert said.pop("bind") == "done"
    assert said.pop("/tmp/bound/timer_list") == "masked"
    assert said.pop("/tmp/bound/kcore") in ("masked", "ENOENT")
    assert said.pop("9p") in ("EPERM", "ENODEV")
    assert said.pop("write") in ("EROFS", "EACCES")
    assert said.pop("writable") in ("EROFS", "EACCES")
    assert set(said.values()) == {"EPERM"}, said


def test_a_torn_write_is_no_more_than_the_programs_own(hostile: Machine) -> None:
    policy = Policy()
    policy.tear(["write", "pwrite64"], keep=5, errno="EIO", args={"fd": (">", 2)})
    said = dict(line.split(" ", 1) for line in calls(hostile, "torn", policy=policy).splitlines())
    assert said == {"oom": "0", "memory": "0", "program": "755 5"}


def test_ways_around_the_kernels_rules(hostile: Machine) -> None:
    policy = Policy()
    policy.errno(["getppid", "time", "gettimeofday"], "EBADE")
    said = dict(line.split(" ") for line in calls(hostile, "around", policy=policy).splitlines())
    assert said.pop("plain") == said.pop("listener") == said.pop("execveat") == "EBADE"
    assert said.pop("uring") != "done"
    assert said.pop("x32", "ENOSYS") in ("ENOSYS", "EPERM", "killed")
    assert said.pop("compat", "killed") == "killed"
    assert said.pop("vsyscall", "EBADE") in ("EBADE", "killed")
    assert not said


def test_pointers_that_lead_nowhere_and_programs_that_die(hostile: Machine) -> None:
    policy = Policy()

    @policy.on("open", "openat")
    def opened(call: Call) -> None:
        if call.path() == "/tmp/held":
            time.sleep(0.001)
        call.proceed()

    begun = time.monotonic()
    said = dict(line.rsplit(" ", 1) for line in calls(hostile, "harm", policy=policy).splitlines())
    assert said == {"no end": "ENAMETOOLONG", "shrunk": "EFAULT", "long": "ENAMETOOLONG", "lives": "done"}
    assert time.monotonic() - begun < 30
    assert hostile.exec(["echo", "here"], policy=opening(), timeout=30).text == "here\n"


def test_calls_that_rules_answer_leave_nothing_with_their_owner(hostile: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivisor.vos.syscalls.remote._MAX_WAITING", 64)
    policy, held = Policy(), []
    policy.fail(["open", "openat"], "ENODATA", path="/ruled/*")

    @policy.on("open", "openat")
    def opened(call: Call) -> None:
        held.append(len(call.listener.held))
        call.open()

    assert calls(hostile, "many", policy=policy) == "256 256\n"
    assert max(held) < 8


def test_programs_that_die_while_their_calls_are_put_off(hostile: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivisor.vos.syscalls.supervisor.MAX_DELAYED", 16)
    policy, held = Policy(), []

    @policy.on("getppid")
    def asked(call: Call) -> None:
        held.append(len(call.listener.held))
        call.delay(3600)
        call.returns(1)

    policy.on("getpgrp")(lambda call: call.returns(1))
    calls(hostile, "delayed", policy=policy)
    assert len(held) > 128
    assert max(held) < 64


@pytest.mark.walls("container")
def test_what_lies_in_the_memory_of_a_command_before_its_execve(hostile: Machine) -> None:
    """A traced one can be looked into by root of the machine while its execve is held: there is nothing of the host."""
    policy, seen = Policy(), []
    home = Path(hostile.info()["folder"]).parent.parent

    @policy.on("execve", timeout=30)
    def executed(call: Call) -> None:
        if not seen:
            seen.append(calls(hostile, "look", str(home), home.name, "/layers/", "/logs/"))
        call.proceed()

    with hostile.syscalls.trace(["true"], calls=["execve"], policy=policy) as trace, suppress(StopIteration):
        list(trace)
    assert seen == ["looked, 0\n"]
