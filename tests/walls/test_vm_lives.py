"""The same lives as with the fake engine, on a few seeds, with QEMU; and kill -9 at each step of its create and start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_state import assert_nothing_left
from lives import drive
from machine_home import KILLED, VmHome, die_at_undo, in_child

from trivisor import VMM, Machine, State

NAME = "web"
MOST = 40


@pytest.fixture
def home(tmp_path: Path, image_home: Path) -> Iterator[VmHome]:
    made = VmHome(tmp_path / "home", image_home)
    yield made
    made.clear()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_verb_in_every_state(image_home: Path) -> None:
    drive(lambda place: VmHome(place, image_home), None, examples=8, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_each_step_of_create_and_start(home: VmHome) -> None:
    """After each death the next VMM() leaves nothing over, and what there is can be used."""
    steps = 0
    for number in range(1, MOST):

        def life(number: int = number) -> None:
            with home.open() as vmm:
                die_at_undo(number)
                vmm.create(home.image, wall="vm", name=NAME, disk="1G").start()

        status = in_child(life)
        assert status in (0, KILLED)
        with home.open() as vmm:
            alive = [machine for machine in vmm.list() if machine.state is State.RUNNING]
            assert bool(alive) == (status == 0)
            for machine in alive:
                usable(machine)
            assert_nothing_left(home.root, {machine.id for machine in vmm.list()})
            if number % 4 == 0:
                for machine in vmm.list():
                    machine.start()
                    usable(machine)
            for machine in vmm.list():
                machine.delete()
            assert_nothing_left(home.root, set())
        if status == 0:
            break
        steps = number
    assert 3 < steps < MOST - 1


def usable(machine: Machine) -> None:
    assert machine.exec(["echo", "here"]).text == "here\n"
    machine.pause()
    machine.resume()
    machine.stop()


def test_run_leaves_nothing(home: VmHome) -> None:
    with home.open() as vmm:
        with vmm.run(home.image, wall="vm") as machine:
            assert machine.exec(["python3", "-c", "print(6 * 7)"]).text == "42\n"
        assert vmm.list() == []
    assert_nothing_left(home.root, set())


def test_the_machine_of_a_dead_process_is_gone(home: VmHome) -> None:
    def work() -> None:
        VMM(home.root).run(home.image, wall="vm")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == KILLED
    with home.open() as vmm:
        assert vmm.list() == []
    assert_nothing_left(home.root, set())
