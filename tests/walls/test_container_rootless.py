"""The container wall for ordinary users, with one id and with subordinate ids: life, NAT and what it denies, limits, leftovers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from rootless_parity import RootlessTests, User, user

from trivisor import VMM
from trivisor.launch import ids
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

    def test_snapshots(self, user: User) -> None:
        def life(vmm: VMM) -> None:
            if ids.probe(vmm.home).kind == "subids":
                try:
                    subprocess.run([sys.executable, "-c", ""], check=True)
                except PermissionError:
                    return  # files of other ids are packed by a Python of its own, which this user may not execute here
            machine = vmm.create("debian", wall="container", name="web")
            machine.start()
            look = "stat -c '%u %a' /data/file; cat /data/file; ls /etc/issue 2>/dev/null"
            machine.exec("mkdir -m 700 /data; echo one > /data/file; rm /etc/issue; chmod 600 /data/file; chown -R 33 /data 2>&1")
            seen = machine.exec(look).text
            machine.snapshot("one")
            machine.exec("echo two > /data/file", check=True)
            (child,) = machine.fork()
            assert child.exec("cat /data/file").text == "two\n"
            child.snapshot("two")
            child.delete(force=True)
            vmm.snapshots.prune(max_bytes=1, dry_run=True)
            machine.restore("one")
            assert machine.exec(look).text == seen
            machine.delete(force=True)
            assert vmm.snapshots.check() == []
            plain = vmm.home / "snapshots" / vmm.snapshots.get("web@one").id / "plain"
            ids.remove_tree(plain)
            again = vmm.create(snapshot="web@one", name="again")
            again.start()
            assert again.exec(look).text == seen
            again.delete(force=True)
            vmm.snapshots.prune(everything=True)
            assert {entry.name for entry in (vmm.home / "snapshots").iterdir()} == {"packs"}

        user.does(life)
