"""What is missing for a test to run: said and skipped on somebody's own machine, a failure in CI, so that no wall goes untested unseen."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacks(what: str) -> NoReturn:
    """End the test that needs `what`."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)
