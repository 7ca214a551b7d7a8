"""A machine of an ordinary user that moves between two homes of that user."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import rootless_home
from migrating import DOWNTIME, SHELL, count, counts_on, receiving, until
from rootless_home import home_of

from trivisor import VMM

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_it_moves_without_root(iced_home: Path) -> None:
    user = rootless_home.NOBODY
    with home_of(user, iced_home) as home:
        there = home / "there"

        def work() -> None:
            shutil.copytree(home, there, symlinks=True)
            with VMM(home) as vmm, receiving(there, f"unix:{home / 'socket'}") as waiting:
                machine = vmm.create("debian", wall="vm", network="nat")
                machine.start()
                machine.spawn(SHELL, detach=True)
                until(lambda: machine.files.exists("/run/count"))
                before = count(machine)
                machine.migrate(waiting.address, downtime=DOWNTIME)
                counts_on(waiting.machine(), before)
                waiting.machine().delete(force=True)
            shutil.rmtree(there)

        rootless_home.as_user(user, work)
