"""Every verb in every state, with the fake engine; tests/walls has the same with a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import FakeEngine
from lives import drive
from machine_home import IMAGE, TestHome

from trivisor import InvalidState, State


@pytest.mark.timeout(300)
def test_every_verb_in_every_state(home_template: Path) -> None:
    drive(lambda place: TestHome(place, home_template), FakeEngine(), examples=40, steps=30)


def test_two_managers_agree(home: TestHome) -> None:
    with home.open() as one, home.open() as two:
        machine = one.create(IMAGE)
        other = two.get(machine.id)
        machine.start()
        assert other.exec(["true"]).exit_code == 0
        other.pause()
        with pytest.raises(InvalidState):
            machine.pause()
        other.stop()
        assert machine.state is State.STOPPED
        machine.start()
        assert other.exec(["echo", "a new line"]).text == "a new line\n"
