"""The container wall for ordinary users, with one id and with subordinate ids: life, NAT and what it denies, limits, leftovers."""

from __future__ import annotations

import os

import pytest
from rootless_parity import RootlessTests, user

__all__ = ["user"]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else"),
    pytest.mark.timeout(300),
]


class TestContainerRootless(RootlessTests):
    wall = "container"
