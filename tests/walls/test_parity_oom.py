"""What becomes of a machine whose memory runs out, and what is said of it, behind each wall."""

from __future__ import annotations

import os

import pytest
from wall_fixtures import Make

from trivisor import VMM, ExecFailed, GuestGone, Machine, State
from trivisor.core.events import Event
from trivisor.launch import cgroup_layout

BOUND = 120.0
HOG = ["python3", "-c", "a = []\nwhile True: a.append(b'x' * (1 << 20))"]


@pytest.fixture(autouse=True)
def needs_a_memory_controller(wall: str) -> None:
    if wall != "vm" and cgroup_layout.layout().of("memory") is None:
        pytest.skip(f"needs the memory controller: {cgroup_layout.layout()}")


def ooms(vmm: VMM, machine: Machine) -> list[Event]:
    return [event for event in vmm.events() if event.machine == machine.id and event.kind == "oom"]


@pytest.mark.walls("vm", "container")
def test_a_killed_program_is_known_to_be_killed_for_memory(make: Make, wall_vmm: VMM) -> None:
    machine = make(memory="128M")
    beside = machine.spawn(["sleep", "1000"])
    with pytest.raises(ExecFailed, match="out of memory") as caught:
        machine.exec(HOG, timeout=BOUND, check=True)
    result = caught.value.result
    assert result.out_of_memory and result.exit_code == 137  # type: ignore[attr-defined]
    assert not machine.exec("kill -9 $$").out_of_memory
    if machine.wall == "container":  # under TCG it takes long
        hogs = [machine.spawn(HOG, stdin=False) for _ in range(2)]
        assert [hog.wait(BOUND) for hog in hogs] == [137, 137]
        assert list(wall_vmm.events()) and all(hog.out_of_memory() for hog in hogs), "whoever asked first"
    assert beside.poll() is None and machine.info()["oom_kills"] == (3 if machine.wall == "container" else 1)
    said = ooms(wall_vmm, machine)
    if machine.wall == "vm" or os.access("/dev/kmsg", os.R_OK):
        assert said[0].detail == "out of memory: the kernel killed a process in it: python3"
    assert 1 <= len(said) <= 3
    beside.kill()


def test_a_machine_is_stopped_as_a_whole(make: Make, wall: str) -> None:
    if wall == "gvisor":
        # Files that it is the first to read are its own to drop and to read again, and the kernel does so for minutes before it gives up.
        make().exec(["python3", "-c", "pass"], check=True)
    machine = make(memory="128M", oom="stop")
    try:
        code = machine.exec(HOG, timeout=BOUND).exit_code
    except GuestGone:
        code = None
    # With cgroups of version 1 the keeper is told, and ends the machine: its PID 1 can be quicker to say that the program died.
    assert code is None or (wall, code) == ("container", 137)
    machine.wait(BOUND)
    assert machine.state is State.FAILED
    assert "ut of memory" in machine.info()["reason"]
    machine.start()
    assert machine.exec(["echo", "again"]).text == "again\n"
