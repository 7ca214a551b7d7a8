"""The ready-made policies, and the examples that are made of them, behind the walls where Python answers system calls."""

from __future__ import annotations

import shutil
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from images_for_tests import PROGRAMS, mini_root
from wall_fixtures import Make

from trivisor import VMM, Machine, Policy, UnsupportedByWall
from trivisor.vos.syscalls import builtin

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import another_world
import database_faults
import fake_server
import sealed_build

pytestmark = pytest.mark.walls("container", "vm")


def python(vm: Machine, policy: Policy, program: str, **options: object) -> str:
    return vm.exec(["python3", "-c", program], policy=policy, check=True, timeout=60, **options).text.strip()  # type: ignore[arg-type]


def test_a_program_believes_in_another_world(running: Machine) -> None:
    first = another_world.look_around(running)
    assert first.splitlines()[:4] == [
        "Atlantis nautilus 20000.1 #7 LEAGUES x86_64",
        "NAME=Atlantis",
        "1999-12-31 23:59",
        "12 processors, MemTotal:       4294967296 kB",
    ]
    assert another_world.look_around(running) == first, "the same random numbers, too"


def test_a_connect_is_answered_by_a_function(running: Machine) -> None:
    said, connections = fake_server.ask(running)
    assert said == "api.example.com 42 for /answer\nevil.example.org cannot be reached\n"
    assert [(one.name, one.port, one.refused) for one in connections] == [("api.example.com", 80, False)]
    assert connections[0].sent.startswith(b"GET /answer")
    assert connections[0].received.endswith(b"42 for /answer")


def test_a_build_writes_under_one_folder_and_its_refusals_are_listed(running: Machine) -> None:
    made, refused = sealed_build.build(running)
    assert made == "compiling\ndone\n"
    assert len(refused) == 3
    for line, word in zip(refused, ("/etc/motd", "/usr/bin/ls", "192.0.2.1:443"), strict=True):
        assert word in line
        assert "EACCES" in line


@pytest.mark.walls("gvisor")
def test_gvisor_says_that_it_cannot(running: Machine) -> None:
    with pytest.raises(UnsupportedByWall) as caught:
        another_world.look_around(running)
    assert "container" in caught.value.hint


def test_ids_are_what_was_said(running: Machine) -> None:
    policy = Policy()
    builtin.identity(policy, uid=1234, gid=99)
    assert (
        python(running, policy, "import os; print(os.getuid(), os.geteuid(), os.getgid(), os.getresuid())")
        == "1234 1234 99 (1234, 1234, 1234)"
    )


def test_sizes_are_the_limits(running: Machine) -> None:
    policy = Policy()
    builtin.limits(policy, memory=512 << 20, cpus=3, swap=64 << 20, booted=datetime.now(UTC).timestamp() - 3600)
    program = """
import os
def read(name): return open("/proc/" + name).read()
print(len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20)
print(read("cpuinfo").count("processor"), read("swaps").count("/dev/swap"), read("stat").count("cpu"))
print(3600 <= float(read("uptime").split()[0]) < 7200, read("loadavg").split()[0])
"""
    assert python(running, policy, program).split("\n") == ["3 512", "3 1 4", "True 0.00"]


def test_a_shown_file_cannot_be_written(running: Machine) -> None:
    policy = Policy()
    builtin.files(policy, {"/etc/motd": "hello\n", "/etc/now": lambda call: f"asked by {call.name}\n"})
    program = """
import os
print(open("/etc/motd").read(), end="")
print(open("/etc/now").read(), end="")
os.chdir("/etc")
print(open("../etc/./motd").read(), end="")
try:
    open("/etc/motd", "w")
except PermissionError:
    print("refused")
"""
    assert python(running, policy, program).split("\n") == ["hello", "asked by openat", "hello", "refused"]


def test_a_shifted_clock_goes_on_and_sleeps_are_as_long(running: Machine) -> None:
    policy = Policy()
    builtin.clock(policy, shift=-86400 * 365)
    program = "import time; a, m = time.time(), time.monotonic(); time.sleep(0.2); print(time.time() - a, time.monotonic() - m, a)"
    passed, measured, began = map(float, python(running, policy, program).split())
    assert 0.2 <= passed < 30
    assert 0.2 <= measured < 30
    assert abs(datetime.now(UTC).timestamp() - 86400 * 365 - began) < 86400


def test_a_clock_holds_in_what_a_program_starts(running: Machine) -> None:
    policy = Policy()
    builtin.clock(policy, now=datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC), frozen=True)
    done = running.exec("date -u +%FT%T; sh -c 'date -u +%FT%T' | cat", policy=policy, check=True)
    assert done.text.split() == ["2001-02-03T04:05:06"] * 2


def test_random_numbers_are_their_seed(running: Machine) -> None:
    program = "import os; print(os.urandom(8).hex(), open('/dev/urandom', 'rb').read(200000)[-4:].hex())"

    def drawn(seed: int) -> str:
        policy = Policy()
        builtin.seeded(policy, seed)
        return python(running, policy, program)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_system_mounts_and_makes_nodes(running: Machine) -> None:
    policy = Policy()
    builtin.system(policy)
    script = """
mkdir -p /mnt/t && mount -t tmpfs tmpfs /mnt/t && echo in > /mnt/t/f && grep -c ' /mnt/t ' /proc/mounts
mknod /mnt/null c 1 3 && echo gone > /mnt/null && test ! -s /mnt/null && echo null
mknod /mnt/mem c 1 1 2>/dev/null || echo no mem
mount -t ext4 /dev/null /mnt/t 2>/dev/null || echo no ext4
"""
    assert running.exec(script, policy=policy, timeout=60).text.split("\n")[:4] == ["1", "null", "no mem", "no ext4"]


def test_no_thread_is_left(running: Machine) -> None:
    fake_server.ask(running)
    for thread in threading.enumerate():
        if thread.name.startswith("fake "):
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite3")
@pytest.mark.parametrize("most", [40, pytest.param(200, marks=pytest.mark.soak)])
def test_a_database_survives_every_fault_at_each_of_its_first_writes(
    wall_vmm: VMM, make: Make, wall: str, tmp_path: Path, most: int
) -> None:
    wall_vmm.images.import_(mini_root(tmp_path / "root", f"{PROGRAMS} sqlite3"), "sqlite")
    writes = most if wall == "container" else most // 10
    machine = make("sqlite")
    assert database_faults.torture(machine, writes) == dict.fromkeys(("ENOSPC", "EIO", "torn"), writes)
    machine.delete(force=True)


@pytest.mark.parametrize(("errno", "exit_code"), [("EIO", 1), (None, 0)])
def test_a_torn_write_leaves_its_beginning(running: Machine, errno: str | None, exit_code: int) -> None:
    policy = Policy()
    policy.tear("write", keep=3, errno=errno, path="/tmp/torn")
    done = running.exec("printf 123456 > /tmp/torn", policy=policy, timeout=30)
    assert bool(done.exit_code) == bool(exit_code)
    assert running.files.read("/tmp/torn") == b"123"


def test_only_writes_to_files_are_torn(running: Machine) -> None:
    policy = Policy()
    policy.tear("write", keep=3, path="*pipe:*")
    done = running.exec("printf 123456", policy=policy, timeout=30)
    assert done.exit_code
    assert done.stdout == b""
