"""Handlers of an ordinary user answer the programs of containers that the user made: with and without subordinate ids."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from rootless_home import NOBODY, account, as_user, home_of

from trivisor import VMM
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to become another user")

SOURCE = """
import os
def read(path):
    try:
        with open(path) as file: return file.read().strip()
    except OSError as error: return error.errno
print([read(path) for path in ("/virtual", "/etc/secret", "/etc/other")], os.uname().sysname)
"""


def handled(home: Path) -> None:
    """In the user's process: one machine, one program, whose memory is read and written."""
    policy = Policy()

    @policy.on("openat")
    def opened(call: Call) -> None:
        match call.path():
            case "/virtual":
                call.give(b"from Python")
            case "/etc/secret":
                call.errno(errno.EACCES)
            case "/etc/other":
                call.open("/etc/hostname")
            case _:
                call.proceed()

    @policy.on("uname")
    def named(call: Call) -> None:
        call.write_struct("buf", {"sysname": "Plan9"})
        call.returns(0)

    with VMM(home) as vmm:
        report = next(report for report in vmm.walls() if report.wall == "container")
        if not report.available:
            return
        with vmm.run("debian", wall="container", network="none") as machine:
            done = machine.exec(["python3", "-c", SOURCE], policy=policy, timeout=30)
            assert done.text == f"['from Python', 13, '{machine.name}'] Plan9\n", done


@pytest.mark.walls("container")
@pytest.mark.parametrize("subordinate", [False, True], ids=["one-id", "subordinate-ids"])
def test_an_ordinary_user_answers(image_home: Path, subordinate: bool) -> None:
    with contextlib.ExitStack() as stack:
        user = stack.enter_context(account()) if subordinate else NOBODY
        home = stack.enter_context(home_of(user, image_home))
        as_user(user, lambda: handled(home))
