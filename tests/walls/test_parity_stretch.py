"""A disk that is made larger, while programs write to it and while the machine stands still, behind each wall."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, InvalidSpec, Machine
from trivisor.core.spec import Wall
from trivisor.launch import ext4
from trivisor.vmm import layers, stretch

MIB = 1 << 20


@pytest.fixture(scope="module")
def small(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    """One machine with a disk of 32 MB; each test goes on from what the one before made of it."""
    able, why = (True, "") if wall == "vm" else layers.disk_sizes()
    if not able:
        pytest.skip(why)
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, disk="32M")
        machine.start()
        yield machine
        machine.delete(force=True)


def room(machine: Machine) -> int:
    return int(machine.exec("df -B1 --output=size / | tail -1", check=True).text)


def test_it_grows_under_a_program_that_writes(small: Machine) -> None:
    live = small.wall == "vm" or ext4.able()
    writer = small.spawn("while echo word; do sleep 0.02; done >/root/words")
    before = room(small)
    assert before < 32 * MIB
    plan = small.modify(disk="72M", dry_run=True)
    assert str(plan).startswith("disk 32M to 72M") and plan.restart != live
    assert live or "at its next start: a file system in use" in str(plan)
    assert (room(small), small.spec.disk) == (before, 32 * MIB)
    assert small.modify(disk="72M") == plan
    if not live:
        small.stop()
        small.start()
        writer = small.spawn("while echo word; do sleep 0.02; done >/root/words")
    assert small.spec.disk == 72 * MIB and room(small) > before + 36 * MIB
    small.exec("head -c 45M /dev/zero | tr '\\0' x >/root/big && sync", check=True, timeout=120)
    assert small.files.stat("/root/big").size == 45 * MIB
    assert writer.poll() is None
    writer.kill()
    assert small.modify(disk="72M").changes == ()


def test_it_does_not_shrink(small: Machine) -> None:
    with pytest.raises(InvalidSpec, match="does not shrink: its file system lies on all of its 72M"):
        small.modify(disk="64M")
    assert small.spec.disk == 72 * MIB


def test_a_stopped_one_grows_at_its_next_start(small: Machine) -> None:
    small.stop()
    assert small.modify(disk="96M").changes[0].when == "start"
    small.start()
    assert room(small) > 82 * MIB and small.files.stat("/root/big").size == 45 * MIB
    small.exec("rm /root/big && fallocate -l 70M /root/large", check=True)


def test_less_space_than_it_may_take_is_said(small: Machine) -> None:
    context, row = small._context, small._row()
    assert stretch.note(context, row, 97 * MIB) == ""
    said = small.modify(disk="900G", dry_run=True).changes[0].note
    assert "the host has" in said and "may come to take" in said


def test_one_that_is_no_disk(make: Make, wall: Wall) -> None:
    machine = make(disk="ram")
    with pytest.raises(InvalidSpec, match="kept in memory"):
        machine.modify(disk="64M")
    if wall == "vm":
        return
    with pytest.raises(InvalidSpec, match="no disk of its own"):
        make().modify(disk="64M")
