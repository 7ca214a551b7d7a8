"""Control groups in the life of machines: kills are written down once, and no group outlives what it was for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import engine_pid, keeper_pid
from machine_home import TestHome

from trivisor import VMM, Machine, State
from trivisor.core.paths import Home
from trivisor.core.units import MIB
from trivisor.launch import cgroup_layout, cgroups
from trivisor.launch.cgroups import Cgroup, Limits


@pytest.fixture(autouse=True)
def needs_a_memory_controller() -> None:
    if cgroup_layout.layout().of("memory") is None:
        pytest.skip(f"needs the memory controller: {cgroup_layout.layout()}")


def grouped(home: TestHome, machine: Machine) -> Cgroup:
    """Give the machine groups, as an engine does as it starts."""
    return Cgroup.create(Home(home.root), machine.id, Limits(memory=32 * MIB))


def join(group: Cgroup) -> None:
    for folder in group.fds:
        fd = os.open("cgroup.procs", os.O_WRONLY, dir_fd=folder)
        os.write(fd, b"0")
        os.close(fd)


def hog(group: Cgroup) -> None:
    with group:
        done = subprocess.run([sys.executable, "-c", f"b'x' * {256 * MIB}"], preexec_fn=lambda: join(group), check=False)
    assert done.returncode == -signal.SIGKILL


def sleeper(group: Cgroup) -> subprocess.Popen[bytes]:
    with group:
        return subprocess.Popen(["sleep", "1000"], preexec_fn=lambda: join(group))


def test_a_kill_is_an_event_and_in_info(home: TestHome, vmm: VMM, running: Machine) -> None:
    group = grouped(home, running)
    assert running.info()["oom_kills"] == 0
    hog(group)
    with home.open() as other:
        assert other.get(running.id).info()["oom_kills"] == 1
        assert running.info()["oom_kills"] == 1
        hog(group)
        hog(group)
        events = [event for event in vmm.events() if event.kind == "oom"]
        assert [event for event in other.events() if event.kind == "oom"] == events
    said = [event.detail.split(" in it")[0] for event in events]
    assert said == [f"out of memory: the kernel killed {what}" for what in ("a process", "2 processes")]
    assert {event.machine for event in events} == {running.id}
    hog(group)
    running.stop()
    assert running.info()["oom_kills"] == 4, "what came last is not lost with the group"
    running.start()
    assert running.info()["oom_kills"] == 0


def test_no_group_outlives_a_life(home: TestHome, running: Machine) -> None:
    ends = [
        running.stop,
        lambda: os.kill(engine_pid(home.folder(running)), signal.SIGKILL),
        lambda: os.kill(keeper_pid(home.folder(running)), signal.SIGKILL),
    ]
    for end in ends:
        left = sleeper(grouped(home, running))
        end()
        running.wait(10)
        assert running.state in (State.STOPPED, State.FAILED)
        assert left.wait(10) == -signal.SIGKILL
        assert cgroups.names(Home(home.root)) == set()
        running.start()
    left = sleeper(grouped(home, running))
    running.delete(force=True)
    assert left.wait(10) == -signal.SIGKILL
    assert cgroups.names(Home(home.root)) == set()


def test_a_new_start_takes_away_what_a_crash_left(home: TestHome, stopped: Machine) -> None:
    left = sleeper(grouped(home, stopped))
    stopped.start()
    assert left.wait(10) == -signal.SIGKILL
    assert cgroups.names(Home(home.root)) == set()


def test_groups_of_no_row_are_swept(home: TestHome, running: Machine) -> None:
    place = Home(home.root)
    grouped(home, running)
    stray = place.machine("0123456789ab").root
    stray.mkdir()
    left = sleeper(Cgroup.create(place, stray.name, Limits()))
    with home.open():
        assert left.wait(10) == -signal.SIGKILL
        assert cgroups.names(place) == {running.id}
    assert not Path(stray).exists()
