"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def image_home() -> Path:
    """The home that set-up made (scripts/setup.sh): it holds the image "debian", and keeps kit and ice between runs.

    Tests that use it delete the machines they make.
    """
    home = Path(os.environ.get("TRIVISOR_TEST_HOME") or ROOT / ".trivisor-demo")
    if not (home / "trivisor.db").exists():
        pytest.skip(f"needs the image that `make test` makes in {home}")
    return home
