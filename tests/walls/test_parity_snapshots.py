"""Snapshots, restore, suspend and fork by their public verbs: what ran goes on where the wall can, files where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from machine_home import VmHome

from trivisor import VMM, InvalidState, Machine, State, UnsupportedByWall

# A program with something in its memory, an open file, and a connection to itself; it answers each line of a FIFO in a file.
_WARM = """
import os, socket
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
one = socket.create_connection(listener.getsockname()); two = listener.accept()[0]
log = open("/var/log/warm", "w"); count = 0
os.mkfifo("/run/asks")
asks = os.fdopen(os.open("/run/asks", os.O_RDWR))  # one that writes, too: between two writers it would close, and drop what came
open("/run/ready", "w").close()
for line in asks:
    count += 1
    one.sendall(line.encode()); heard = two.recv(99).decode().strip()
    log.write(f"{count} {heard}\\n"); log.flush()
    answer = open("/run/answer", "w"); answer.write(f"{count} {heard} {os.getpid()}"); answer.close()
    os.rename("/run/answer", "/run/answered")
"""
_HOOK = """
mkdir -p /etc/trivisor/after-clone.d; cd /etc/trivisor/after-clone.d
printf '#!/bin/sh\\nhead -c 8 /dev/urandom | od -An -tx8 > /var/seed\\n' > reseed; chmod 755 reseed
"""


@pytest.fixture(scope="module")
def vmm(wall_home: VmHome, wall: str) -> Iterator[VMM]:
    with VMM(wall_home.root) as opened:
        yield opened


@contextmanager
def warm(vmm: VMM, wall: str, name: str) -> Iterator[Machine]:
    with vmm.run("debian", wall=wall, name=name, env={"FROM": "spec"}) as machine:
        machine.files.write("/root/warm.py", _WARM.encode())
        machine.spawn("exec python3 /root/warm.py >/root/said 2>&1", detach=True)
        machine.exec(_HOOK + "while [ ! -e /run/ready ]; do sleep 0.05; done", timeout=60, check=True)
        yield machine


@pytest.fixture(scope="module")
def web(vmm: VMM, wall: str) -> Iterator[Machine]:
    with warm(vmm, wall, "web") as machine:
        yield machine
    for one in vmm.snapshots.list():
        vmm.snapshots.remove(one.ref)


def ask(machine: Machine, word: str) -> list[str]:
    script = f"rm -f /run/answered; echo {word} > /run/asks; while [ ! -e /run/answered ]; do sleep 0.02; done; cat /run/answered"
    return machine.exec(script, timeout=60, check=True).text.split()


def test_files_there_and_back(vmm: VMM, web: Machine) -> None:
    web.exec("echo one > /var/state", check=True)
    taken = web.snapshot("files", memory=False, quiesce=True, note="one")
    assert not taken.memory and taken.quiesced
    web.exec("echo two > /var/state; sync", check=True)
    with vmm.run(snapshot="web@files", name="kid") as kid:
        assert kid.exec("cat /var/state; hostname; echo $FROM").text == "one\nkid\nspec\n"
    assert web.exec("cat /var/state").text == "two\n"


def test_what_ran_goes_on(vmm: VMM, web: Machine, wall: str) -> None:
    if wall == "container":
        for call in (web.suspend, lambda: web.snapshot("all", memory=True)):
            with pytest.raises(UnsupportedByWall):
                call()
        return
    first = ask(web, "hello")
    taken = web.snapshot("ready")
    assert taken.memory and taken.paused < 30
    assert ask(web, "again")[0] == str(int(first[0]) + 1)
    web.restore("ready")
    assert ask(web, "back") == [str(int(first[0]) + 1), "back", first[2]]
    web.suspend()
    assert web.state is State.SUSPENDED
    with pytest.raises(InvalidState):
        web.exec(["true"])
    web.resume()
    assert ask(web, "awake") == [str(int(first[0]) + 2), "awake", first[2]]
    assert web.exec("tail -n 1 /var/log/warm").text == f"{int(first[0]) + 2} awake\n"
    found = vmm.snapshots.diff("web@files", "web@ready")
    assert "var/state" in {change.path for change in found.files if change.how == "changed"}


def test_copies(vmm: VMM, web: Machine, wall: str) -> None:
    web.exec("echo forked > /var/state; sync", check=True)
    before = ask(web, "hello") if wall != "container" else []
    one, two = web.fork(2)
    try:
        (three,) = one.fork(names=["deep"])
        kids = [one, two, three]
        assert [kid.name for kid in kids] == [f"{web.name}-1", f"{web.name}-2", "deep"]
        for kid in kids:
            assert kid.exec("cat /var/state; hostname; cat /etc/hostname").text == f"forked\n{kid.name}\n{kid.name}\n"
            if wall != "container":
                assert ask(kid, kid.name) == [str(int(before[0]) + 1), kid.name, before[2]]
        drawn = {machine.exec("head -c 8 /dev/urandom | od -An -tx8").text for machine in (web, *kids)}
        assert len(drawn) == 4
        if wall != "container":
            assert len({kid.exec("cat /var/seed", check=True).text for kid in kids}) == 3
        assert len({machine.exec("cat /etc/machine-id").text for machine in (web, *kids)}) == 4
        one.exec("echo mine > /var/state", check=True)
        assert web.exec("cat /var/state").text == two.exec("cat /var/state").text == "forked\n"
    finally:
        for machine in vmm.list():
            if machine.name != "web":
                machine.delete(force=True)
    assert web.exec(["true"]).exit_code == 0


def test_to_another_home(vmm: VMM, web: Machine, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("carry") / "web.snapshot"
    ref = vmm.snapshots.list("web")[-1].ref
    vmm.snapshots.export(ref, file)
    taken = vmm.snapshots.import_(file, "far@away")
    with vmm.run(snapshot=taken.ref, name="far") as far:
        assert far.exec("hostname").text == "far\n"
    assert vmm.snapshots.check() == []
    assert vmm.snapshots.du().packs > 0
