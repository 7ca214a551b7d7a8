"""Virtual machines frozen while they run: all that runs in one goes on in its copies, and in itself, whatever happens to who freezes it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from machine_home import VmHome, in_child
from missing import lacks

from trivisor import VMM, HostLacks, InvalidState, Machine, State, StorageError, UnsupportedByWall
from trivisor.core.devices import Random
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import backup, freezing, frozen, pages
from trivisor.vmm.engines.vm.engine import VmEngine

REPL = """\
import os, random, signal, socket, threading, time
count, state = 0, {}
generator = random.Random(7)
signal.signal(signal.SIGHUP, lambda *_: generator.seed(os.urandom(16)))
open("/run/pid", "w").write(str(os.getpid()))
server = socket.create_server(("127.0.0.1", 7))
def echo():
    peer = server.accept()[0]
    while data := peer.recv(100):
        peer.sendall(data.upper())
threading.Thread(target=echo, daemon=True).start()
line = socket.create_connection(("127.0.0.1", 7))
kept = open("/root/kept", "w+")
def counting():
    global count
    while True:
        count += 1
        time.sleep(0.02)
threading.Thread(target=counting, daemon=True).start()
os.mkfifo("/tmp/ask"); os.mkfifo("/tmp/say")
print("ready", flush=True)
while True:
    said = repr(eval(open("/tmp/ask").read(), globals()))
    with open("/tmp/say", "w") as out:
        out.write(said)
"""


SIZES = "open('/proc/meminfo').readline()"


def ask(machine: Machine, expression: str) -> str:
    """Have the program that has run in the machine all along evaluate an expression."""
    return machine.exec(["sh", "-c", 'printf %s "$0" > /tmp/ask && cat /tmp/say', expression], timeout=30, check=True).text


def begin(machine: Machine) -> Machine:
    """Have that program run, and remember something in each way that there is."""
    program = machine.spawn(["python3", "-c", REPL], detach=True)
    assert program.stdout.readline() == b"ready\n"
    ask(machine, "state.update(name='first') or kept.write('begun ') and kept.flush()")
    return machine


def assert_goes_on(machine: Machine) -> None:
    assert ask(machine, "state['name']") == "'first'"
    assert ask(machine, "line.send(b'hello') and line.recv(100)") == "b'HELLO'"
    assert ask(machine, "kept.write('more ') and kept.flush()") == "None"
    assert machine.files.read_text("/root/kept").startswith("begun more ")
    before = int(ask(machine, "count"))
    assert int(ask(machine, "(time.sleep(0.2), count)[1]")) > before


@pytest.fixture(scope="module")
def vmm(wall_home: VmHome) -> Iterator[VMM]:
    with VMM(wall_home.root) as opened:
        if not next(report for report in opened.walls() if report.wall == "vm").available:
            lacks("needs the vm wall")
        yield opened
        for machine in opened.list():
            machine.delete(force=True)


@pytest.fixture(scope="module")
def parent(vmm: VMM) -> Machine:
    machine = vmm.create("debian", wall="vm")
    machine.start()
    machine.exec("mkdir -p /etc/trivisor/after-clone.d", check=True)
    machine.files.write("/etc/trivisor/after-clone.d/said", b"#!/bin/sh\nhostname >> /root/cloned; kill -HUP $(cat /run/pid)\n", mode=0o755)
    return begin(machine)


def engine_of(machine: Machine) -> tuple[VmEngine, Box, Context]:
    context = machine._context
    row = context.records.row(machine.id)
    assert row is not None
    engine = context.engine("vm")
    assert isinstance(engine, VmEngine)
    return engine, context.box(row), context


def freeze(machine: Machine, into: Path, *, memory: bool = True) -> None:
    engine, box, _ = engine_of(machine)
    into.mkdir()
    engine.freeze(box, into, memory=memory, progress=lambda _: None)


@pytest.fixture
def folder(vmm: VMM, wall_home: VmHome) -> Iterator[Path]:
    """Where a machine may be frozen by hand: on the home's file system."""
    place = wall_home.root / "tmp" / f"{os.getpid()}-0-frozen"
    yield place
    if place.exists():
        for path in place.iterdir():
            path.unlink()
        place.rmdir()


def test_what_runs_goes_on_in_the_copies_and_in_the_parent(parent: Machine) -> None:
    streaming = parent.spawn(["sh", "-c", "while read line; do echo got $line; done"])
    kids = parent.fork(2)
    for machine in (*kids, parent):
        assert_goes_on(machine)
    streaming.stdin.write(b"one\n")
    assert streaming.stdout.readline() == b"got one\n"
    streaming.kill()
    random = {machine.exec("head -c 32 /dev/urandom").stdout for machine in (*kids, parent)}
    identities = [
        machine.exec("hostname; cat /etc/machine-id /sys/class/net/eth0/address; hostname -I").text for machine in (*kids, parent)
    ]
    assert len(random) == 3
    assert len({ask(machine, "generator.random()") for machine in (*kids, parent)}) == 3, "a program's own generator, told by the hook"
    for said in zip(*(text.replace("127.0.1.1", "").split() for text in identities), strict=True):
        assert len(set(said)) == 3, identities
    assert [kid.exec("tail -n 1 /root/cloned").text.strip() for kid in kids] == [kid.name for kid in kids]
    assert all(abs(float(kid.exec("date +%s.%N").text) - time.time()) < 5 for kid in kids)
    # What a copy does is its own.
    kids[0].exec("echo mine > /root/mine", check=True)
    assert not kids[1].files.exists("/root/mine")
    for kid in kids:
        kid.delete(force=True)


def test_each_has_its_own_place_on_the_network(vmm: VMM) -> None:
    """Its own address and MAC address, and a port of the host's that leads to it; who listened in the parent listens in each."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    if not next(report for report in vmm.walls() if report.wall == "vm").features["nat"]:
        lacks("needs machines with NAT")
    with begin(vmm.run("debian", wall="vm", network="nat", ports={port: 80})) as machine:
        ask(machine, "state.update(web=socket.create_server(('0.0.0.0', 80)))")
        kids = machine.fork(2)
        assert len({port, *(each for kid in kids for each in kid.spec.ports)}) == 3
        said = set()
        for each in (*kids, machine):
            with socket.create_connection(("127.0.0.1", *each.spec.ports), timeout=10) as client:
                ask(each, f"state['web'].accept()[0].sendall(b'{each.name}')")
                assert client.recv(100) == each.name.encode()
            said.add(each.exec("cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 || hostname -I").text)
            assert each.exec(["python3", "-c", "import socket; socket.getaddrinfo('localhost', 80)"]).exit_code == 0
            assert_goes_on(each)
        assert len(said) == 3, said
        for kid in kids:
            kid.delete(force=True)


def test_copies_of_copies(parent: Machine) -> None:
    child = parent.fork()[0]
    ask(child, "state.update(name='second')")
    grandchild = child.fork()[0]
    child.delete(force=True)
    assert ask(grandchild, "state['name']") == "'second'"
    assert ask(grandchild, "line.send(b'still') and line.recv(100)") == "b'STILL'"
    last = grandchild.fork()[0]
    assert ask(last, "(state['name'], kept.closed)") == "('second', False)"
    for machine in (grandchild, last):
        machine.delete(force=True)


def test_a_paused_machine_stays_paused_and_its_copy_runs(parent: Machine) -> None:
    parent.pause()
    child = parent.fork()[0]
    assert parent.state == State.PAUSED
    assert_goes_on(child)
    child.delete(force=True)
    parent.resume()
    assert_goes_on(parent)


def test_suspended_it_is_nothing_but_files(vmm: VMM) -> None:
    machine = begin(vmm.run("debian", wall="vm"))
    with machine:
        name = machine.exec("cat /etc/machine-id").text
        machine.suspend()
        assert machine.state == State.SUSPENDED
        machine.resume()
        assert_goes_on(machine)
        assert machine.exec("cat /etc/machine-id").text == name
        machine.stop()
        machine.start()
        assert machine.files.read_text("/root/kept").startswith("begun more")


@pytest.mark.parametrize("step", ["before", "take", "after"])
def test_whoever_freezes_it_dies_and_it_goes_on(parent: Machine, folder: Path, step: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def freezing() -> None:
        setattr(pages.Pages, step, die)
        with VMM(parent._context.home.root) as other:
            freeze(other.get(parent.name), folder)

    assert in_child(freezing) == -signal.SIGKILL
    began = time.monotonic()
    assert_goes_on(parent)
    assert time.monotonic() - began < 20
    parent.pause()
    assert parent.state == State.PAUSED
    parent.resume()


def test_a_large_layer_is_copied_beside_the_machine(parent: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "SMALL", 0)
    monkeypatch.setattr(backup, "_shares_blocks", lambda *_: False)
    parent.exec("head -c 20000000 /dev/urandom > /root/large && sha256sum /root/large > /root/sum && sync", check=True)
    writing = parent.spawn("i=0; while :; do i=$((i+1)); echo $i > /root/n$((i%50)); sync; done")
    first, second = parent.fork()[0], parent.fork()[0]
    writing.kill()
    for kid in (first, second):
        kid.exec("echo 3 > /proc/sys/vm/drop_caches; sha256sum -c /root/sum", check=True)
        assert "EXT4-fs error" not in kid.exec("dmesg").text
        kid.delete(force=True)
    parent.exec("sha256sum -c /root/sum && rm /root/large", check=True)


def test_a_copy_that_nobody_waits_for_any_more_is_given_up(parent: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def freezing() -> None:
        monkeypatch.setattr(backup, "SMALL", 0)
        monkeypatch.setattr(backup.Copy, "after", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        with VMM(parent._context.home.root) as other:
            freeze(other.get(parent.name), folder)

    assert in_child(freezing) == -signal.SIGKILL
    child = parent.fork()[0]
    assert_goes_on(child)
    child.delete(force=True)


def test_the_layer_alone(vmm: VMM, parent: Machine) -> None:
    parent.exec("echo written > /root/written", check=True)
    parent.snapshot("files", memory=False)
    machine = vmm.create(snapshot=f"{parent.name}@files")
    machine.start()
    assert machine.files.read_text("/root/written") == "written\n"
    machine.exec("echo changed > /root/written && sync", check=True)
    machine.stop()
    machine.snapshot("stopped", memory=False)
    machine.delete(force=True)
    again = vmm.create(snapshot=f"{machine.name}@stopped")
    again.start()
    assert again.files.read_text("/root/written") == "changed\n"
    again.delete(force=True)
    for kept in vmm.snapshots.list():
        vmm.snapshots.remove(kept.ref)


@pytest.mark.parametrize("spec", [{"ram": "shared"}, {"hugepages": "transparent", "disk": "ram"}], ids=["shared", "booted"])
def test_memory_that_is_no_ice(vmm: VMM, spec: dict[str, str]) -> None:
    """RAM that is a file in memory, or of the process alone; and whether a copy of the copy is right when that has it from a file."""
    with begin(vmm.run("debian", wall="vm", **spec)) as machine:
        child = machine.fork()[0]
        grandchild = child.fork()[0]
        for each in (machine, child, grandchild):
            assert_goes_on(each)
        for each in (child, grandchild):
            each.delete(force=True)


def test_what_no_copy_could_go_on_with_is_refused(vmm: VMM, parent: Machine) -> None:
    parent.devices.attach(Random(), "more")
    with pytest.raises(UnsupportedByWall, match="attached to it, more") as failure:
        parent.fork()
    assert "detach" in failure.value.hint
    parent.devices.detach("more")
    parent.fork()[0].delete(force=True)
    with vmm.run("debian", wall="vm", disk="ram") as machine, pytest.raises(UnsupportedByWall, match="in its memory"):
        machine.snapshot("files", memory=False)


@pytest.mark.parametrize("spec", [pytest.param({}, id="ice"), pytest.param({"ram": "shared"}, id="shared", marks=pytest.mark.soak)])
def test_what_it_was_given_while_it_ran_goes_along(vmm: VMM, spec: dict[str, str]) -> None:
    with begin(vmm.run("debian", wall="vm", **spec)) as machine:
        machine.modify(memory=machine.spec.memory + (128 << 20), cpus=2, timeout=60)
        # Programs have of what came before they have of what was there.
        ask(machine, "state.update(much=[bytes([at]) * (1 << 20) for at in range(100)])")
        before = ask(machine, f"__import__('zlib').crc32(b''.join(state['much'][::7])), {SIZES}")
        child = machine.fork()[0]
        grandchild = child.fork()[0]
        for each in (child, grandchild, machine):
            assert ask(each, f"__import__('zlib').crc32(b''.join(state['much'][::7])), {SIZES}") == before
            assert each.exec("nproc").text == "2\n"
        child.delete(force=True)
        ask(grandchild, "state.clear()")
        grandchild.modify(memory=machine.spec.memory + (128 << 20), timeout=60)
        assert int(grandchild.exec("grep MemTotal /proc/meminfo").text.split()[1]) > 420_000
        grandchild.delete(force=True)
        machine.suspend()
        machine.resume()
        assert ask(machine, f"__import__('zlib').crc32(b''.join(state['much'][::7])), {SIZES}") == before


def test_what_is_damaged_or_does_not_fit_is_refused_with_the_reason(parent: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(parent, folder)
    engine, box, _ = engine_of(parent)
    _, facts = frozen.load(folder, "")
    engine.fits(box, facts.needs)
    for word in ("qemu", "kernel", "guest", "processor", "root"):
        with pytest.raises(HostLacks, match=f"frozen with {word} other"):
            engine.fits(box, {**facts.needs, word: "other"})
    for name in ("state", "frozen.json", "disk.qcow2"):
        path = folder / name
        whole = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        with pytest.raises(StorageError, match="damaged"):
            frozen.load(folder, "")
        path.write_bytes(whole)
    disk, last = folder / "disk.qcow2", frozen.DISK
    leads = bytearray(disk.read_bytes())
    leads[8:16] = (4096).to_bytes(8, "big")
    disk.write_bytes(leads)
    monkeypatch.setattr(frozen, "sha256", lambda path: facts.disk_digest if path.name == last else facts.state_digest)
    with pytest.raises(StorageError, match="leads to another file"):
        frozen.load(folder, "")
    disk.write_bytes(whole)
    assert facts.shape is not None
    frozen.agree(box, facts.shape)
    for change in ({"memory": 1 << 40}, {"cpus": 4000}, {"tap": not facts.shape.tap}, {"upper": False}):
        with pytest.raises(StorageError, match="not a machine of this spec"):
            frozen.agree(box, replace(facts.shape, **change))
    os.truncate(folder / "ram", 4096)
    with pytest.raises(StorageError, match="damaged: ram"):
        frozen.load(folder, "")


def test_file_systems_at_rest(vmm: VMM, parent: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that has nothing in it is not replayed; and both go on writing at once, not when their rest would be over by itself."""
    monkeypatch.setattr(freezing, "_REST", 60_000)
    writing = parent.spawn("i=0; while :; do i=$((i+1)); echo $i > /root/n$((i%50)); sync; done")
    parent.snapshot("rested", quiesce=True)
    kid = vmm.create(snapshot=f"{parent.name}@rested")
    kid.start()
    for machine in (kid, parent):
        machine.exec("echo more > /root/more && sync", timeout=45, check=True)
    parent.snapshot("files", memory=False, quiesce=True)
    alone = vmm.create(snapshot=f"{parent.name}@files")
    alone.start()
    assert "recovery complete" not in alone.exec("dmesg").text
    writing.kill()
    parent.pause()
    with pytest.raises(InvalidState, match="paused"):
        parent.snapshot("paused", quiesce=True)
    parent.resume()
    for machine in (kid, alone):
        machine.delete(force=True)
    for kept in vmm.snapshots.list():
        vmm.snapshots.remove(kept.ref)
