"""Snapshots, restore and fork of containers: their files, of which a copy is made once, however many machines come from it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from machine_home import KILLED, VmHome, in_child

from trivisor import VMM, Machine, State, UnsupportedByWall
from trivisor.vmm.engines.container import freezing

pytestmark = pytest.mark.walls("container")

_WORK = """
set -e
cd /var/lib
mkdir made made/deep; echo one > made/deep/one; ln made/deep/one made/two; ln -s deep/one made/link
chown 1234:77 made/deep/one; chmod 4750 made/deep/one; mkfifo made/pipe
truncate -s 50M made/holes; echo x >> made/holes
rm -r /etc/apt; mkdir /etc/apt; echo new > /etc/apt/new; rm /etc/issue
"""
_LOOK = "cd /var/lib/made; stat -c '%n %u %g %a %h %s %F' deep/one two link pipe holes; ls -A /etc/apt; ls /etc/issue 2>&1; cat two"
_CHANGE = """
rm -r /var/lib/made /etc/apt
mkdir /var/lib/made /etc/apt; echo again > /etc/apt/again; echo mine > /var/lib/made/mine
"""
_CHANGED = "ls -A /var/lib/made /etc/apt; ls -d /etc/issue 2>&1; cat /var/lib/made/mine"


@pytest.fixture(scope="module")
def vmm(wall_home: VmHome, wall: str) -> Iterator[VMM]:
    with VMM(wall_home.root) as opened:
        yield opened


@pytest.fixture(scope="module")
def parent(vmm: VMM) -> Iterator[Machine]:
    with vmm.run("debian", wall="container", name="parent") as machine:
        machine.exec(_WORK, check=True)
        yield machine
        for one in vmm.snapshots.list():
            vmm.snapshots.remove(one.ref)


def test_all_that_was_written(vmm: VMM, parent: Machine) -> None:
    seen = parent.exec(_LOOK).text
    assert "1234 77 4750 2 4" in seen and "No such file" in seen
    one, two = parent.fork(2)
    try:
        assert one.exec(_LOOK).text == two.exec(_LOOK).text == seen
        assert one.exec("cat /etc/hostname; hostname").text == "parent-1\nparent-1\n"
        one.exec(_CHANGE, check=True)
        (deep,) = one.fork()
        (deeper,) = deep.fork()
        changed = one.exec(_CHANGED).text
        assert changed == deep.exec(_CHANGED).text == deeper.exec(_CHANGED).text
        for machine in (deep, deeper, one):
            machine.delete(force=True)
        assert two.exec(_LOOK).text == parent.exec(_LOOK).text == seen
        two.stop()
        two.start()
        assert two.exec(_LOOK).text == seen
    finally:
        for machine in vmm.list():
            if machine.name != "parent":
                machine.delete(force=True)


def test_back_and_forth(vmm: VMM, parent: Machine) -> None:
    assert not parent.snapshot("made").memory
    parent.exec("rm -r /var/lib/made; echo later > /var/lib/later", check=True)
    parent.snapshot("later")
    for name, there in (("made", "made"), ("later", "later"), ("made", "made")):
        parent.restore(name)
        assert parent.exec("cd /var/lib; ls -d made later 2>/dev/null").text == f"{there}\n"
    with vmm.run(snapshot="parent@later", memory="64M") as other:
        assert other.exec("cat /var/lib/later").text == "later\n"
        assert other.spec.memory == 64 << 20
    assert parent.state is State.RUNNING


def test_what_the_wall_cannot(parent: Machine) -> None:
    for call in (parent.suspend, lambda: parent.snapshot("all", memory=True)):
        with pytest.raises(UnsupportedByWall, match="container") as caught:
            call()
        assert {"vm", "gvisor"} & {*caught.value.walls}
    assert parent.state is State.RUNNING


def test_what_lies_between(vmm: VMM, parent: Machine) -> None:
    parent.restore("made")
    parent.exec("cd /var/lib/made; echo more >> two; rm pipe; echo x > /root/new; rm /etc/debian_version; chmod 700 /srv", check=True)
    parent.snapshot("changed")
    found = vmm.snapshots.diff("parent@made", "parent@changed")
    said = {change.path: (change.how, change.kind, change.before, change.after) for change in found.files}
    assert said["var/lib/made/two"] == ("changed", "f", 4, 9)  # and of what lies in the image, or in what it was made from, no hard link
    assert said["root/new"] == ("added", "f", None, 2)
    assert said["var/lib/made/pipe"] == ("removed", "p", 0, None)
    assert (said["etc/debian_version"][0], said["etc/debian_version"][3]) == ("removed", None)
    assert said["srv"][:2] == ("changed", "d")
    assert len(said) == 5 and found.pages is None, said
    back = vmm.snapshots.diff("parent@changed", "parent@made")
    assert {change.how for change in back.files if change.path == "root/new"} == {"removed"}
    assert vmm.snapshots.diff("parent@made", "parent@made").files == ()


def test_a_commit_of_what_was_forked(vmm: VMM, parent: Machine) -> None:
    (child,) = parent.fork()
    child.exec("echo child > /var/lib/child", check=True)
    image = child.commit("forked")
    child.delete(force=True)
    with vmm.run(image.name, wall="container") as machine:
        assert machine.exec("cat /var/lib/child /etc/apt/new; ls /etc/issue 2>/dev/null").text == "child\nnew\n"
    vmm.images.remove(image.name)


def test_who_freezes_dies(vmm: VMM, wall_home: VmHome, parent: Machine) -> None:
    """Killed while the machine stands still for it: it goes on by itself."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        freezing._copy = die  # type: ignore[assignment]
        with VMM(wall_home.root) as other:
            other.get("parent").snapshot("never")

    assert in_child(child) == KILLED
    deadline = time.monotonic() + 60
    while parent.state is not State.RUNNING or parent.info()["operation"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the shell that lets it go on has noticed, or does now
    assert parent.exec("echo on", timeout=20).text == "on\n"
    with VMM(wall_home.root) as other:
        assert "parent@never" not in [one.ref for one in other.snapshots.list()]
    assert parent.snapshot("never").ref == "parent@never"
