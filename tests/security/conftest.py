"""Tests of what stands between machines and the host: test_parity_*.py behind every wall, the others behind one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_sentinel import Sentinel
from wall_fixtures import WALLS, Make, generate, make, pytest_configure, running, wall

__all__ = ["Make", "make", "pytest_configure", "running", "wall"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    generate(metafunc, WALLS if metafunc.module.__name__.startswith("test_parity_") else ("vm",))


@pytest.fixture
def sentinel() -> Iterator[Sentinel]:
    """The host, which must be as it was when the test is over."""
    found = Sentinel()
    yield found
    try:
        found.check()
    finally:
        found.close()


@pytest.fixture(scope="session")
def escape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that tries to get out (escape.c)."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    program = tmp_path_factory.mktemp("escape") / "escape"
    source = Path(__file__).with_name("escape.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source], check=True)
    return program
