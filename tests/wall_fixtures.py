"""Fixtures of tests that run behind walls, named by the stage of life that the machine is in.

A test that asks for one of them runs once behind each wall: vm, gvisor, container. `@pytest.mark.walls("vm")` says which
ones it is about, if not all. A wall that the host does not offer is skipped with what is missing; in CI that is a
failure, so that no wall goes untested unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from machine_home import VmHome
from missing import lacks

from trivisor import VMM, Machine
from trivisor.core.spec import WALLS, Wall

Make = Callable[..., Machine]


def generate(metafunc: pytest.Metafunc, walls: Sequence[str] = WALLS) -> None:
    """Have each test run behind the walls that it is marked with, else behind `walls` (called from pytest_generate_tests)."""
    if "wall" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("walls")
        metafunc.parametrize("wall", mark.args if mark else walls, indirect=True, scope="session")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "walls(*names): the walls that the test is about")


@pytest.fixture(scope="session")
def wall(request: pytest.FixtureRequest, wall_home: VmHome) -> Wall:
    """The wall that the test is run behind."""
    name: Wall = request.param
    with VMM(wall_home.root) as vmm:
        report = next(report for report in vmm.walls() if report.wall == name)
    if not report.available:
        lacks(f"needs the {name} wall: {report.why} ({report.remedy})")
    return name


@pytest.fixture
def make(wall_vmm: VMM, wall: Wall) -> Make:
    """Make and start a machine for one test, of the image "debian" unless told otherwise."""

    def started(image: str = "debian", **spec: object) -> Machine:
        machine = wall_vmm.create(image, **{"wall": wall, **spec})  # type: ignore[arg-type]
        machine.start()
        return machine

    return started


@pytest.fixture
def created(wall_vmm: VMM, wall: Wall) -> Machine:
    return wall_vmm.create("debian", wall=wall)


@pytest.fixture(scope="module")
def running(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    """One running machine for all tests of a module that do it no harm."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, env={"FROM_SPEC": "spec"})
        machine.start()
        yield machine
        machine.delete(force=True)


@pytest.fixture
def paused(make: Make) -> Machine:
    machine = make()
    machine.pause()
    return machine


@pytest.fixture
def stopped(make: Make) -> Machine:
    machine = make()
    machine.stop()
    return machine
