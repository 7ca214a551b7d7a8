"""The container wall for ordinary users, with one id and with subordinate ids: life, NAT and what it denies, limits, leftovers."""

from __future__ import annotations

import os

import pytest
from rootless_parity import RootlessTests, User, user

from trivisor import VMM
from trivisor.vos.devices import CharDevice

__all__ = ["user"]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else"),
    pytest.mark.timeout(300),
]


class Upper(CharDevice):
    """Answers in capitals."""

    def receive(self, data: bytes) -> bytes:
        return data.upper()


class TestContainerRootless(RootlessTests):
    wall = "container"

    def test_a_line_made_of_python(self, user: User) -> None:
        def life(vmm: VMM) -> None:
            machine = vmm.create("debian", wall="container")
            machine.start()
            machine.devices.attach(Upper(), "line")
            assert machine.exec("exec 3<>/dev/line; echo hello >&3; head -n 1 <&3", timeout=20).text == "HELLO\n"
            machine.devices.detach("line")
            assert not machine.files.exists("/dev/line")

        user.does(life)
