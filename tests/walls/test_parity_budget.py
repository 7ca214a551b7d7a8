"""A budget of memory with machines that really hold some, behind each wall."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from wall_fixtures import Make

from trivisor import VMM, Machine, OverBudget
from trivisor.core.units import MIB
from trivisor.launch import cgroup_layout


@pytest.fixture
def budget(wall_vmm: VMM) -> Iterator[None]:
    """Room for one machine of 256M, and a part of another."""
    held = sum(holding.holds for holding in wall_vmm.budget.holdings())
    wall_vmm.budget.set(held + 400 * MIB)
    yield
    wall_vmm.budget.clear()


def holds(vmm: VMM, machine: Machine) -> int:
    return next(holding.holds for holding in vmm.budget.holdings() if holding.name == machine.name)


def test_a_machine_has_room_when_another_is_paused(make: Make, created: Machine, wall_vmm: VMM, budget: None) -> None:
    first, second = make(), created
    with pytest.raises(OverBudget, match=first.name):
        second.start()
    assert holds(wall_vmm, first) == 256 * MIB
    first.pause()
    assert holds(wall_vmm, first) < 144 * MIB
    second.start()
    assert second.exec(["echo", "there is room"]).ok
    with pytest.raises(OverBudget, match=second.name):
        first.resume()
    second.stop(timeout=0)
    first.resume()
    assert first.exec(["echo", "again"]).ok


@pytest.mark.walls("container", "gvisor")
def test_what_a_paused_machine_read_is_given_up_for_another(make: Make, wall_vmm: VMM, budget: None) -> None:
    if cgroup_layout.layout().of("memory") is None or cgroup_layout.layout().of("freezer") is None:
        pytest.skip(f"needs the memory and freezer controllers: {cgroup_layout.layout()}")
    first = make()
    first.exec("head -c 160M /dev/zero > /root/read; cat /root/read > /dev/null; sync", check=True)
    first.pause()
    before = holds(wall_vmm, first)
    assert before > 160 * MIB
    second = make()
    assert second.state == "running"
    assert holds(wall_vmm, first) <= 144 * MIB


@pytest.mark.walls("container", "gvisor")
def test_a_machine_does_not_grow_beyond_it(make: Make, budget: None) -> None:
    machine = make()
    machine.memory.limit("320M")
    with pytest.raises(OverBudget):
        machine.memory.limit("512M")
    assert machine.spec.memory == 320 * MIB and machine.info()["granted"] == 320 * MIB
    machine.memory.limit("128M")
    assert machine.info()["granted"] == 128 * MIB
