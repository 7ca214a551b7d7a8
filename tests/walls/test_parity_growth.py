"""Memory and processors that a machine is given and gives back while programs run in it, behind each wall."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, GuestError, InvalidSpec, InvalidState, Machine, OverBudget, UnsupportedByWall
from trivisor.core.errors import GuestShort
from trivisor.core.units import MIB
from trivisor.launch import cgroup_layout
from trivisor.launch.cgroups import Cgroup

_HOLDER = "import sys; held = bytearray(b'growth!!'); held *= SIZE << 17; print('ready', flush=True); sys.stdin.read()"
_SHARE = 100_000


@pytest.fixture(scope="module")
def small(wall_home: VmHome) -> Iterator[Machine]:
    """One virtual machine that is given and gives back; each test leaves it with 256 MB and one vCPU."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall="vm", memory="256M")
        machine.start()
        yield machine
        machine.delete(force=True)


def processors(machine: Machine) -> int:
    return int(machine.exec(["nproc"]).text)


def share(machine: Machine) -> float:
    """How many processors of the host a machine may keep busy, as its control group has it."""
    if cgroup_layout.layout().of("cpu") is None:
        pytest.skip("needs a cpu controller")
    group = Cgroup.find(machine._context.home, machine.id)
    assert group is not None
    place = group._of("cpu")
    assert place is not None
    return (int(place.read("cpu.max").split()[0]) if place.unified else place.number("cpu.cfs_quota_us")) / _SHARE


def test_a_machine_grows_and_shrinks_while_a_program_runs(small: Machine) -> None:
    count = small.spawn(["sh", "-c", "while echo on; do sleep 0.05; done"])
    plan = small.modify(cpus=2, memory="512M", dry_run=True)
    assert str(plan) == "cpus 1 to 2\nmemory 256M to 512M" and not plan.restart
    assert small.memory.stats().limit == 256 * MIB and processors(small) == 1
    assert small.modify(cpus=2, memory="512M") == plan
    assert small.memory.stats().limit == 512 * MIB and processors(small) == 2
    assert (small.spec.cpus, small.spec.memory, small.info()["spec"]["memory"]) == (2, 512 * MIB, 512 * MIB)
    assert small.modify(cpus=2, memory="512M").changes == ()

    holder = small.spawn(["python3", "-c", _HOLDER.replace("SIZE", "240")])
    assert holder.stdout.readline() == b"ready\n"
    with small.memory.view(4 << 30) as more:
        assert len(more) == 256 * MIB and b"growth!!" * 512 in bytes(more.data[64 * MIB :])
    assert any(place > 4 << 30 for place in small.memory.search(b"growth!!" * 512, limit=100_000))
    with pytest.raises(InvalidSpec, match="programs hold too much"):
        small.memory.limit("256M")
    assert small.memory.stats().limit == 512 * MIB and holder.poll() is None
    holder.stdin.close()
    assert holder.wait(20) == 0

    small.modify(cpus=1, memory="256M")
    assert small.memory.stats().limit == 256 * MIB and processors(small) == 1
    with pytest.raises(Exception, match="not memory"):
        small.memory.view(4 << 30)
    assert count.poll() is None and len(count.stdout.read(30)) == 30
    count.kill()


def test_the_example(small: Machine) -> None:
    grown = runpy.run_path(str(Path(__file__).parents[2] / "examples/grow.py"))["grow"](small)
    assert grown.plan == "cpus 1 to 2\nmemory 256M to 512M"
    assert grown.processors == (1, 2) and grown.held == 320 and grown.after > grown.before
    small.modify(memory="256M", cpus=1)


def test_a_share_of_the_host_goes_with_vcpus(small: Machine) -> None:
    before = share(small)
    small.modify(cpus=2)
    grown = share(small)
    small.modify(cpus=1)
    assert (before, grown, share(small)) == (1.5, 2.5, 1.5)


def test_what_cannot_be_had_now_is_said_and_kept_for_the_next_start(small: Machine) -> None:
    plan = small.modify(cpus=60, memory="128M")
    assert plan.restart and [change.when for change in plan.changes] == ["restart", "restart"]
    assert "it was started with 256M" in str(plan) and small.memory.stats().limit == 256 * MIB
    assert (small.spec.cpus, small.spec.memory) == (60, 128 * MIB)
    with pytest.raises(InvalidSpec, match="not while it runs"):
        small.memory.limit("100M")
    assert not small.modify(cpus=1, memory="256M").restart


def test_a_guest_that_takes_no_part(small: Machine) -> None:
    small.memory.limit("320M")
    driver = "/sys/bus/virtio/drivers/virtio_mem"
    device = small.exec(f"basename {driver}/virtio*").text.strip()
    small.files.write(f"{driver}/unbind", device.encode())
    with pytest.raises(GuestError, match="the guest took 0 of"):
        small.memory.limit("512M", timeout=0.5)
    assert (small.memory.stats().limit, small.spec.memory) == (320 * MIB, 320 * MIB)
    with pytest.raises(GuestShort, match="gave back 0 of") as short:
        small.memory.limit("256M", timeout=0.5)
    assert short.value.given == 0 and small.memory.stats().limit == 320 * MIB and small.spec.memory == 256 * MIB
    small.stop(timeout=0)
    small.start()
    assert small.memory.stats().limit == 256 * MIB


def test_a_budget_that_has_no_room_changes_nothing(small: Machine, wall_home: VmHome) -> None:
    with VMM(wall_home.root) as vmm:
        vmm.budget.set("300M")
        try:
            with pytest.raises(OverBudget):
                small.memory.limit("512M")
        finally:
            vmm.budget.clear()
    assert (small.memory.stats().limit, small.spec.memory) == (256 * MIB, 256 * MIB)


def test_a_paused_guest_takes_no_part(small: Machine) -> None:
    small.pause()
    try:
        with pytest.raises(InvalidState):
            small.memory.limit("512M")
        with pytest.raises(InvalidState):
            small.modify(cpus=2)
        assert small.memory.stats().limit == 256 * MIB
    finally:
        small.resume()


def test_no_balloon_takes_from_ice(small: Machine) -> None:
    with pytest.raises(UnsupportedByWall) as refused:
        small.memory.balloon("64M")
    assert "ram=" in refused.value.hint
    with pytest.raises(UnsupportedByWall):
        small.memory.reclaim()


@pytest.mark.walls("vm")
def test_a_balloon_takes_from_ram_of_a_machines_own(make: Make) -> None:
    machine = make(ram="shared", cpus=1)
    free = machine.memory.stats()
    machine.exec("cat /usr/bin/* >/dev/null", timeout=60)
    assert machine.memory.balloon("64M") == 64 * MIB
    taken = machine.memory.stats()
    assert taken.limit == 192 * MIB and free.limit == 256 * MIB
    with pytest.raises(GuestShort) as short:
        machine.memory.balloon("250M", timeout=0.5)
    assert 64 * MIB <= short.value.given < 250 * MIB
    # A guest without any memory left takes some back by itself, and gives it up again.
    assert abs((machine.memory.stats().limit or 0) - 256 * MIB + short.value.given) < 8 * MIB
    with pytest.raises(InvalidSpec):
        machine.memory.balloon("256M")
    assert machine.memory.balloon(0) == 0 and machine.memory.stats().limit == 256 * MIB
    holder = machine.spawn(["python3", "-c", _HOLDER.replace("SIZE", "60")])
    assert holder.stdout.readline() == b"ready\n"
    holder.stdin.close()
    assert holder.wait(20) == 0
    before = machine.memory.stats().private
    assert machine.memory.reclaim() > 32 * MIB and machine.memory.stats().private < before - 32 * MIB
    assert machine.memory.stats().limit == 256 * MIB


@pytest.mark.walls("container", "gvisor")
def test_processors_are_changed_while_programs_run(make: Make) -> None:
    machine = make(cpus=0.5)
    assert share(machine) == 0.5
    plan = machine.modify(cpus=1.5, memory="300M")
    assert str(plan) == "cpus 0.5 to 1.5\nmemory 256M to 300M" and share(machine) == 1.5
    assert machine.modify(cpus=0.25).changes[0].when == "now" and share(machine) == 0.25
    with pytest.raises(InvalidSpec):
        machine.modify(cpus=0)
    machine.stop(timeout=0)
    assert machine.modify(cpus=1).changes[0].when == "start"
    machine.start()
    assert share(machine) == 1


@pytest.mark.walls("container", "gvisor")
def test_files_that_were_read_are_reclaimed(make: Make) -> None:
    machine = make()
    if machine.memory.stats().used is None:
        pytest.skip("needs a memory controller")
    machine.exec("dd if=/dev/zero of=/root/file bs=1M count=32; sync; cat /root/file > /dev/null")
    before = machine.memory.stats().used
    took = machine.memory.reclaim()
    after = machine.memory.stats().used
    assert before is not None and after is not None
    if machine.wall == "container":
        assert took > 16 * MIB and before - after > 16 * MIB
    assert machine.exec(["true"]).exit_code == 0
