"""The memory that the machines of a home may have together: who gets it, who is refused, and what a kill leaves of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from machine_home import IMAGE, TestHome

from trivisor import VMM, OverBudget
from trivisor.core.errors import InvalidSpec, TrivisorError
from trivisor.core.units import MIB
from trivisor.vmm.budget import Budget


@pytest.fixture
def tight(vmm: VMM) -> VMM:
    """A home that has room for two machines."""
    vmm.budget.set("512M")
    return vmm


def test_a_machine_that_does_not_fit_is_refused_and_says_who_holds_what(tight: VMM) -> None:
    one, two = (tight.create(IMAGE, name=name, memory="256M") for name in ("one", "two"))
    three = tight.create(IMAGE, name="three", memory="128M")
    one.start()
    two.start()
    with pytest.raises(OverBudget, match=r"128M do not fit.* 512M: held by one 256M, two 256M") as caught:
        three.start()
    assert (caught.value.lacking, caught.value.hint[:4]) == (128 * MIB, "stop")
    assert three.state == "created" and three.info()["granted"] == 0
    two.stop()
    three.start()
    assert [(held.name, held.holds) for held in tight.budget.holdings()] == [("one", 256 * MIB), ("three", 128 * MIB)]


def test_what_can_never_fit_is_refused_before_it_is_made(tight: VMM) -> None:
    with pytest.raises(OverBudget, match="640M do not fit"):
        tight.create(IMAGE, memory="640M")
    assert tight.list() == []


def test_a_paused_machine_holds_what_it_takes_and_asks_again(tight: VMM) -> None:
    one, two = (tight.create(IMAGE, memory="384M") for _ in range(2))
    one.start()
    one.pause()
    assert tight.budget.holdings()[0].holds == 1 * MIB
    two.start()
    with pytest.raises(OverBudget):
        one.resume()
    assert one.state == "paused" and one.info()["granted"] == 0
    two.delete(force=True)
    one.resume()
    assert (one.state, one.info()["granted"]) == ("running", 384 * MIB)


def test_overcommit_promises_more_as_long_as_what_is_taken_fits(tight: VMM) -> None:
    tight.budget.set("512M", overcommit=2)
    machines = [tight.create(IMAGE, memory="256M") for _ in range(5)]
    for machine in machines[:4]:
        machine.start()
    with pytest.raises(OverBudget):
        machines[4].start()


def test_a_budget_is_the_homes_and_outlives_who_set_it(home: TestHome, engine: FakeEngine) -> None:
    with VMM(home.root, memory_budget="300M", engines=[engine]) as first:
        assert first.budget.get() == Budget(memory=300 * MIB)
    with home.open(engine) as second:
        assert second.budget.get() == Budget(memory=300 * MIB)
        machine = second.create(IMAGE, memory="256M")
        machine.start()
        second.budget.set("100M")  # takes nothing away
        assert machine.state == "running"
        second.budget.clear()
        second.create(IMAGE, memory="256M").start()
        # Began without a budget: counted all the same when there is one.
        second.budget.set("700M")
        assert sum(held.holds for held in second.budget.holdings()) == 512 * MIB
        with pytest.raises(OverBudget):
            second.create(IMAGE, memory="256M").start()


def test_budgets_that_are_none(vmm: VMM) -> None:
    for wish, times in (("much", 1), (0, 1), (-5, 1), ("1G", 0.5), ("1G", float("nan")), ("1G", True)):
        with pytest.raises(InvalidSpec):
            vmm.budget.set(wish, times)
    assert vmm.budget.get() is None


def test_a_start_that_fails_holds_nothing(home: TestHome) -> None:
    with home.open(FakeEngine(fail="guest answered")) as vmm:
        vmm.budget.set("256M")
        machine = vmm.create(IMAGE, memory="256M")
        with pytest.raises(TrivisorError, match="as it was told"):
            machine.start()
        assert vmm.budget.holdings() == []
        machine.start()
        machine.stop()
        assert vmm.budget.holdings() == []


def _start(path: Path, name: str, barrier: object, result: object, delay: float) -> None:
    with VMM(path, engines=[FakeEngine(delay=delay)]) as vmm:
        barrier.wait(60)  # type: ignore[attr-defined]
        try:
            vmm.get(name).start()
            result.put("started")  # type: ignore[attr-defined]
        except OverBudget:
            result.put("refused")  # type: ignore[attr-defined]


@pytest.fixture
def processes() -> Iterator[list[object]]:
    made: list[object] = []
    yield made
    for process in made:
        process.kill()  # type: ignore[attr-defined]
        process.join(10)  # type: ignore[attr-defined]


def test_of_processes_that_start_machines_at_once_as_many_succeed_as_fit(home: TestHome, tight: VMM, processes: list[object]) -> None:
    names = [tight.create(IMAGE, memory="256M").name for _ in range(4)]
    context = get_context("fork")
    barrier, result = context.Barrier(4), context.Queue()
    for name in names:
        process = context.Process(target=_start, args=(home.root, name, barrier, result, 0.3))
        process.start()
        processes.append(process)
    said = sorted(result.get(timeout=90) for _ in names)
    assert said == ["refused", "refused", "started", "started"]


def test_a_start_killed_in_the_middle_gives_its_memory_back(home: TestHome, tight: VMM, processes: list[object]) -> None:
    machine, other = (tight.create(IMAGE, memory="384M") for _ in range(2))
    context = get_context("fork")
    process = context.Process(target=_start, args=(home.root, machine.name, context.Barrier(1), context.Queue(), 90.0))
    process.start()
    processes.append(process)
    deadline = time.monotonic() + 60
    while not tight._context.records.row(machine.id).granted and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    with pytest.raises(OverBudget, match=machine.name):
        other.start()
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    other.start()
    assert machine.state == "created" and machine.info()["granted"] == 0
