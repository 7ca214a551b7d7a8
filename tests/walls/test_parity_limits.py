"""Limits hold behind every wall, and one that cannot be enforced is an error that says what is missing."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import VMM, GuestGone, HostLacks, InvalidState, Machine, State, UnsupportedByWall
from trivisor.core.spec import Wall
from trivisor.launch import cgroup_layout, cgroups
from trivisor.launch.cgroups import Cgroup

BOUND = 120.0
MIB = 1 << 20
HOG = "a = []\nwhile True: a.append(b'x' * (1 << 20))"
SPIN = "import time\nbegun = time.monotonic()\nwhile time.monotonic() < begun + 2: pass"
SHARED_WALLS = ("gvisor", "container")


def needs(*controllers: str) -> None:
    layout = cgroup_layout.layout()
    for name in controllers:
        if layout.of(name) is None:
            pytest.skip(f"needs the {name} controller: {layout.lacks[name]}")


def group(machine: Machine) -> Cgroup:
    found = Cgroup.find(machine._context.home, machine.id)
    assert found is not None
    return found


@pytest.mark.walls(*SHARED_WALLS)
def test_memory(make: Make, wall_vmm: VMM) -> None:
    """The program that takes too much is killed; that is an event, and in info(); the machine lives."""
    needs("memory")
    machine = make(memory="128M")
    assert machine.info()["oom_kills"] == 0
    if machine.wall == "container":
        assert machine.exec(["python3", "-c", HOG], timeout=BOUND).signal == 9
        assert machine.exec(["echo", "alive"]).text == "alive\n"
        assert machine.info()["oom_kills"] == 1
        assert group(machine).usage().peak <= 128 * MIB
    else:
        # The host's kernel chooses between the program and gVisor's, which is one process: with it the machine ends.
        try:
            assert not machine.exec(["python3", "-c", HOG], timeout=BOUND).ok
        except GuestGone:
            machine.wait(BOUND)  # its line may end before it does
            assert machine.state is State.FAILED
        assert machine.info()["oom_kills"] >= 1
        try:
            assert machine.exec(["echo", "alive"]).text == "alive\n"
        except (GuestGone, InvalidState):  # it has ended, or does so behind its program
            machine.wait(BOUND)
            machine.start()
            assert machine.exec(["echo", "alive"]).text == "alive\n"
    events = [event.kind for event in wall_vmm.events() if event.machine == machine.id].count("oom")
    # Behind gVisor the program may be followed by what it ran on, between two looks.
    assert events == 1 if machine.wall == "container" else events >= 1


@pytest.mark.walls("container")
def test_memory_of_the_machines_file_systems_counts(make: Make) -> None:
    needs("memory")
    machine = make(memory="64M")
    result = machine.exec("head -c 200M /dev/zero >/dev/shm/a", timeout=BOUND)
    assert not result.ok, "either /dev/shm is full or the writer was killed"
    assert group(machine).usage().peak <= 64 * MIB
    assert machine.exec(["echo", "alive"]).text == "alive\n"


@pytest.mark.walls(*SHARED_WALLS)
def test_pids(make: Make) -> None:
    needs("pids")
    machine = make(pids=100)
    many = "i=0; while [ $i -lt 300 ]; do sleep 1000 & i=$((i + 1)); done"
    if machine.wall == "gvisor":
        # Its kernel cannot go on when the host refuses it a process; that is the end of the machine, and of nothing else.
        with pytest.raises(GuestGone):
            machine.exec(many, timeout=BOUND)
        machine.wait(BOUND)  # its line may end before it does
        assert machine.state is State.FAILED
    else:
        result = machine.exec(many, timeout=BOUND)
        assert not result.ok
        assert b"Resource temporarily unavailable" in result.stderr or b"Cannot fork" in result.stderr
        assert group(machine).counters().pids_refused > 0
        assert group(machine).usage().pids <= machine.spec.pids  # type: ignore[operator]
        machine.stop(timeout=1)
    machine.start()
    assert machine.exec(["echo", "alive"]).text == "alive\n"


@pytest.mark.walls(*SHARED_WALLS)
def test_a_fork_bomb_meets_the_default(make: Make) -> None:
    """Nothing was asked for, and still it holds."""
    needs("pids")
    machine = make()
    with machine.spawn("bomb() { bomb | bomb & }; bomb; sleep 3"):
        time.sleep(2)
        if (bombed := Cgroup.find(machine._context.home, machine.id)) is not None:
            assert bombed.usage().pids <= 2048
        begun = time.monotonic()
        try:
            machine.stop(timeout=0)
        except InvalidState:  # gVisor's kernel may have met the bound by now, which is its end (test_pids)
            assert machine.wall == "gvisor" and machine.state is State.FAILED
        assert time.monotonic() - begun < 60
    assert cgroups.Cgroup.find(machine._context.home, machine.id) is None
    machine.start()
    assert machine.exec(["echo", "alive"]).text == "alive\n"


@pytest.mark.walls(*SHARED_WALLS)
def test_cpus(make: Make) -> None:
    """A quarter of a processor, for one that spins and for many."""
    needs("cpu")
    machine = make(cpus=0.25)
    before, begun = machine.stats().cpu_seconds, time.monotonic()
    threads = [threading.Thread(target=machine.exec, args=(["python3", "-c", SPIN],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    took = time.monotonic() - begun
    assert (machine.stats().cpu_seconds - before) / took < 0.4


def test_cpuset(make: Make) -> None:
    needs("cpuset")
    last = max(os.sched_getaffinity(0))
    machine = make(cpuset=str(last))
    machine.exec(["true"], check=True)
    pids = group(machine).pids()
    assert pids
    looked = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            assert re.findall(r"Cpus_allowed_list:\t(.*)", Path(f"/proc/{pid}/status").read_text()) == [str(last)]
            looked += 1
    assert looked


def test_a_processor_that_is_not_there(wall_vmm: VMM, wall: Wall) -> None:
    needs("cpuset")
    machine = wall_vmm.create("debian", wall=wall, cpuset="4000")
    with pytest.raises(HostLacks, match="cpuset") as caught:
        machine.start()
    assert "the host has the processors" in caught.value.hint
    assert machine.state == "created"
    assert not cgroups.names(machine._context.home) & {machine.id}


def uncached(folder: Path) -> None:
    """Have the host forget what it has in memory of a machine's files (posix_fadvise(2))."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.timeout(300)
def test_reading(make: Make) -> None:
    """What is read from the disk comes no faster than was asked for, and without a limit faster than that."""
    needs("io")
    took = {}
    for limits in ({}, {"io": {"read_bps": "4M"}}):
        machine = make(**limits)
        machine.exec(f"head -c {12 * MIB} /dev/urandom >/root/data; sync", check=True, timeout=BOUND)
        if machine.wall == "vm":
            machine.exec("echo 3 >/proc/sys/vm/drop_caches", check=True)
        uncached(Path(machine.info()["folder"]))
        result = machine.exec("cat /root/data | wc -c", check=True, timeout=BOUND)
        assert result.text.strip() == str(12 * MIB)
        took[bool(limits)] = result.duration
        machine.delete(force=True)
    assert took[True] > 2
    assert took[False] < took[True]


def test_writing_where_it_cannot_be_limited(wall_vmm: VMM, wall: Wall) -> None:
    layout = cgroup_layout.layout()
    found = layout.of("io")
    if found is None or found.unified:
        pytest.skip("needs a host with cgroup version 1 for its disks")
    machine = wall_vmm.create("debian", wall=wall, io={"write_bps": "1M"})
    with pytest.raises(HostLacks, match="cannot limit writing"):
        machine.start()


def test_a_limit_that_the_host_cannot_enforce(wall_vmm: VMM, wall: Wall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for: refused before anything is made. Left to its default: said in the facts."""
    whole = cgroup_layout.layout()
    names = ("memory", "cpu", "cpuset", "pids", "io")
    kept = tuple(found for found in whole.hierarchies if not found.controllers & set(names))
    bare = cgroup_layout.Layout(whole.kind, kept, dict.fromkeys(names, "it was taken away"), dict.fromkeys(names, "give it back"))
    monkeypatch.setattr(cgroup_layout, "layout", lambda: bare)
    wishes: dict[str, object] = {"cpuset": "0", "io": {"read_bps": 1}}
    if wall != "vm":
        wishes |= {"memory": "64M", "cpus": 0.5, "pids": 10}
    for name, value in wishes.items():
        with pytest.raises(HostLacks, match=f"{name} cannot be limited on this host: it was taken away") as caught:
            wall_vmm.create("debian", wall=wall, **{name: value})
        assert caught.value.hint == "give it back"
    machine = wall_vmm.create("debian", wall=wall)
    machine.start()
    if wall != "vm":
        assert "memory is not limited: it was taken away" in machine.info()["facts"]["lacks"]
    assert machine.exec(["true"]).ok


@pytest.mark.walls("vm")
def test_what_means_nothing_to_a_virtual_machine(wall_vmm: VMM) -> None:
    for wish in ({"swap": "1M"}, {"pids": 10}):
        with pytest.raises(UnsupportedByWall) as caught:
            wall_vmm.create("debian", wall="vm", **wish)
        assert caught.value.walls == ("gvisor", "container")


def test_groups_come_and_go_with_the_machine(make: Make) -> None:
    machine = make(cpuset="0")
    home = machine._context.home
    assert machine.id in cgroups.names(home)
    machine.stop()
    assert machine.id not in cgroups.names(home)
    machine.start()
    assert machine.id in cgroups.names(home)
    machine.delete(force=True)
    assert machine.id not in cgroups.names(home)
