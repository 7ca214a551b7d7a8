"""Fixtures of the command line's tests. Its machines are those of tests/unit/machines: a real keeper and guest on the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "machines"))

from cli_support import Cli
from machine_home import IMAGE, TestHome, tiny_template


@pytest.fixture(scope="session")
def cli_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_template(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def home(tmp_path: Path, cli_template: Path) -> Iterator[TestHome]:
    made = TestHome(tmp_path / "home", cli_template)
    yield made
    made.clear()


@pytest.fixture
def cli(home: TestHome, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(home, capfd, monkeypatch)


@pytest.fixture
def web(cli: Cli) -> str:
    """The name of a running machine."""
    assert cli("run", "-d", "--name", "web", IMAGE).status == 0
    return "web"
