"""Fixtures of the tests of machines: they run the real keeper and guest on the host (tests/fake_engine.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from machine_home import IMAGE, TestHome, tiny_template

from trivisor.vmm.machine import Machine
from trivisor.vmm.manager import VMM


@pytest.fixture(scope="session")
def home_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def home(tmp_path: Path, home_template: Path) -> Iterator[TestHome]:
    made = TestHome(tmp_path / "home", home_template)
    yield made
    made.clear()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def vmm(home: TestHome, engine: FakeEngine) -> Iterator[VMM]:
    with home.open(engine) as opened:
        yield opened


@pytest.fixture
def created(vmm: VMM) -> Machine:
    return vmm.create(IMAGE)


@pytest.fixture
def running(created: Machine) -> Machine:
    created.start()
    return created


@pytest.fixture
def paused(running: Machine) -> Machine:
    running.pause()
    return running


@pytest.fixture
def stopped(running: Machine) -> Machine:
    running.stop()
    return running
