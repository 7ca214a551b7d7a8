"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_state import Leftovers, assert_nothing_left
from images_for_tests import mini_image
from machine_home import VmHome
from missing import lacks

from trivisor import VMM
from trivisor.core.paths import Home

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Take Ctrl-C even where a shell in the background had it ignored: what the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the last test: no process, mount, cgroup, interface, socket or folder of the session is left on the host."""
    before = Leftovers(tmp_path_factory.getbasetemp())
    yield
    assert before.since() == []


@pytest.fixture(scope="session")
def image_home() -> Path:
    """The home that set-up made (scripts/setup.sh): it holds the image "debian", and keeps kit and ice between runs.

    Tests that use it delete the machines they make.
    """
    home = Path(os.environ.get("TRIVISOR_TEST_HOME") or ROOT / ".trivisor-demo")
    if not (home / "trivisor.db").exists():
        lacks(f"needs the image that `make test` makes in {home}")
    return home


@pytest.fixture(scope="session")
def iced_home(image_home: Path) -> Path:
    """The same once it has ice for its image, so that no copy of it boots; as it is where there is no vm wall."""
    with VMM(image_home) as vmm:
        if not next(report for report in vmm.walls() if report.wall == "vm").available:
            return image_home
        for _ in range(2):  # an image's own ice is made at its second start
            with vmm.run("debian", wall="vm", disk="8G"):
                pass
    return image_home


@pytest.fixture(scope="session")
def wall_home(tmp_path_factory: pytest.TempPathFactory, iced_home: Path) -> Iterator[VmHome]:
    """A copy of it that tests may fill with machines; it has the image "mini" too."""
    home = VmHome(tmp_path_factory.mktemp("wall") / "home", iced_home)
    mini_image(Home(home.root))
    yield home
    home.clear()
    assert_nothing_left(home.root, set())
    shutil.rmtree(home.root.parent)


@pytest.fixture
def own_home(tmp_path: Path, iced_home: Path) -> Iterator[VmHome]:
    """A copy for one test, which may harm it."""
    home = VmHome(tmp_path / "home", iced_home)
    yield home
    home.clear()
    assert_nothing_left(home.root, set())
    shutil.rmtree(home.root)


@pytest.fixture
def wall_vmm(wall_home: VmHome) -> Iterator[VMM]:
    """The shared home, opened for one test; the machines that it makes are deleted after it."""
    with VMM(wall_home.root) as vmm:
        before = {machine.id for machine in vmm.list()}
        yield vmm
        for machine in vmm.list():
            if machine.id not in before:
                machine.delete(force=True)
