"""Tests of what stands between machines and the host."""

from __future__ import annotations

import pytest
from wall_fixtures import Make, generate, make, pytest_configure, running, wall

__all__ = ["Make", "make", "pytest_configure", "running", "wall"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    generate(metafunc, ("vm",))
