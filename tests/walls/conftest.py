"""Tests of machines behind their walls (tests/wall_fixtures.py): test_parity_*.py behind each of them, the others behind one."""

from __future__ import annotations

import pytest
from wall_fixtures import WALLS, Make, created, generate, make, paused, pytest_configure, running, stopped, wall

__all__ = ["Make", "created", "make", "paused", "pytest_configure", "running", "stopped", "wall"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    generate(metafunc, WALLS if metafunc.module.__name__.startswith("test_parity_") else ("vm",))
