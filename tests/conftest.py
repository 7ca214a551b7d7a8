"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import iced
import pytest
import workers
from host_state import assert_nothing_left
from hypothesis import HealthCheck, settings
from images_for_tests import mini_image
from machine_home import VmHome
from missing import lacks

from trivisor import VMM
from trivisor.core.paths import Home

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Take Ctrl-C even where a shell in the background had it ignored: what the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long one example takes, and how long it takes to think of one, says on a busy host nothing of what is tested.
    settings.register_profile("patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
    config.pluginmanager.register(workers.Session(), "session of trivisor")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workers share, for what one of them makes for all (`workers.once`)."""
    return workers.shared(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def image_home(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home that set-up made (scripts/setup.sh): it holds the image "debian", and keeps kit and ice between runs.

    Tests that use it delete the machines they make. Of several workers each has a copy of it, with ice for the image.
    """
    home = Path(os.environ.get("TRIVISOR_TEST_HOME") or ROOT / ".trivisor-demo")
    if not (home / "trivisor.db").exists():
        lacks(f"needs the image that `make test` makes in {home}")
    if workers.COUNT == 1:
        yield home
        return
    base = tmp_path_factory.mktemp("image")
    with workers.once(shared_folder, "ice") as first:
        if first:
            iced.make(home)
        copy = VmHome(base / "home", home)
    yield copy.root
    copy.clear()
    assert_nothing_left(copy.root, set())
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def iced_home(image_home: Path) -> Path:
    """The same once it has ice for its image, so that no copy of it boots; as it is where there is no vm wall."""
    if workers.COUNT == 1:
        iced.make(image_home)
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
