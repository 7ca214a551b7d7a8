"""Machines frozen in the midst of things: commands that somebody waits for, published ports, volumes, calls that a handler holds."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, GuestGone, HostLacks, Machine, UnsupportedByWall
from trivisor.vos.devices import BlockDevice, CharDevice, Serial
from trivisor.vos.process import Process
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

pytestmark = pytest.mark.walls("vm", "gvisor")

_BOUND = 40
_ASKS = """
import os
def ask():
    try: return os.getpgid(0)
    except OSError as error: return -error.errno
first = ask()
open("/run/said.new", "w").write(f"{first} {ask()}")
os.rename("/run/said.new", "/run/said")
"""
"""A program that makes a call that a handler holds, and then once more; it says what it got."""
_SAID = "until test -e /run/said; do sleep 0.02; done; cat /run/said; rm /run/said"
_RULED = """
import os, time
def ask():
    try: return os.getsid(0)
    except OSError as error: return -error.errno
print(ask(), flush=True)
while not os.path.exists("/run/over"):
    time.sleep(0.05)
    open("/run/ruled.new", "w").write(str(ask()))
    os.rename("/run/ruled.new", "/run/ruled")
"""
_TRACED = "i=0; while [ ! -e /run/enough ]; do i=$((i+1)); echo $i > /run/turn; done"
_TURNS = "until read a < /run/turn; do :; done; until read b < /run/turn && [ $b -ge $((a+20)) ]; do sleep 0.02; done"
_RECORD = 16384
_WRITES = """
import os, threading
def hammer():
    block, file, at = os.urandom(1 << 18), os.open("/root/hammer", os.O_CREAT | os.O_WRONLY), 0
    while True:
        os.pwrite(file, block, (at % 8) << 18)
        os.fsync(file)
        at += 1
threading.Thread(target=hammer, daemon=True).start()
records, number = os.open("/root/records", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 0
folder = os.open("/root", os.O_RDONLY)
while True:
    number += 1
    os.write(records, number.to_bytes(8, "little") * 2048)
    os.fsync(records)
    with open("/root/state.new", "w") as state:
        state.write(str(number))
        state.flush()
        os.fsync(state.fileno())
    os.rename("/root/state.new", "/root/state")
    os.fsync(folder)  # or the name is not yet on the disk
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def vmm(wall_home: VmHome, wall: str) -> Iterator[VMM]:
    with VMM(wall_home.root) as opened:
        yield opened
        for machine in opened.list():
            machine.delete(force=True)
        for one in opened.snapshots.list():
            opened.snapshots.remove(one.ref)


@pytest.fixture(scope="module")
def parent(vmm: VMM, wall: str) -> Machine:
    """On vm the rule is answered by the machine's answerer, on gVisor by the Sentry itself."""
    machine = vmm.create("debian", wall=wall, syscalls=["getsid:return=77" if wall == "vm" else "getsid:EACCES"])
    machine.start()
    return machine


def test_a_command_that_somebody_waits_for(parent: Machine, wall: str) -> None:
    """It goes on in both. In the parent who waits gets all, or is told that nobody hears it any more; in the child nobody waits."""
    script = "echo begun; touch /run/begun; until test -e /run/go; do sleep 0.05; done; echo on > /run/ended; echo ended"
    ends: list[object] = []

    def wait() -> None:
        try:
            ends.append(parent.exec(script, timeout=_BOUND).text)
        except GuestGone as error:
            ends.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    parent.exec("until test -e /run/begun; do sleep 0.02; done", timeout=_BOUND, check=True)
    child = parent.fork()[0]
    try:
        for machine in (child, parent):
            assert not machine.files.exists("/run/ended")
            said = machine.exec("touch /run/go; until test -s /run/ended; do sleep 0.02; done; cat /run/ended", timeout=_BOUND, check=True)
            assert said.text == "on\n", machine.name
    finally:
        child.delete(force=True)
        parent.exec("touch /run/go")
        waiting.join(_BOUND)
    assert not waiting.is_alive()
    if wall == "vm":
        assert ends == ["begun\nended\n"]
    else:
        assert isinstance(ends[0], GuestGone)


def test_rules_of_the_machine_hold_in_its_copies(parent: Machine, wall: str) -> None:
    """For the command that ran under them, which goes on being answered, and for those that come."""
    wanted = "77" if wall == "vm" else "-13"
    process = parent.spawn(["python3", "-c", _RULED])
    assert process.stdout.readline() == f"{wanted}\n".encode()
    child = parent.fork()[0]
    try:
        for machine in (child, parent):
            fresh = machine.exec("rm -f /run/ruled; until test -e /run/ruled; do sleep 0.02; done; cat /run/ruled", timeout=_BOUND)
            assert fresh.text == wanted
            assert machine.exec(["python3", "-c", _RULED.replace("while not", "while 0 and")], timeout=_BOUND).text == f"{wanted}\n"
    finally:
        child.delete(force=True)
        parent.exec("touch /run/over")


class Holding:
    """A handler that holds the first call until `go`."""

    def __init__(self) -> None:
        self.policy, self.held, self.go = Policy(), threading.Event(), threading.Event()
        self.policy.on("getpgid", timeout=_BOUND)(self._slow)

    def _slow(self, call: Call) -> None:
        self.held.set()
        self.go.wait(_BOUND)
        call.returns(4242)


@contextmanager
def held(machine: Machine) -> Iterator[tuple[Holding, Process]]:
    """A program in the machine whose call is held at this instant."""
    holding = Holding()
    process = machine.spawn(["python3", "-c", _ASKS], policy=holding.policy)
    try:
        assert holding.held.wait(_BOUND)
        yield holding, process
    finally:
        holding.go.set()
        process.close()


@pytest.mark.walls("vm")
def test_a_call_that_a_handler_holds(parent: Machine) -> None:
    """The parent's is answered as if nothing had been. In the child nobody answers it: it is refused at once, and those that follow."""
    with held(parent) as (holding, process):
        child = parent.fork()[0]
        try:
            assert child.exec(_SAID, timeout=_BOUND).text == "-1 -1"
        finally:
            child.delete(force=True)
        assert not parent.files.exists("/run/said")
        holding.go.set()
        assert process.wait(_BOUND) == 0
        assert parent.exec(_SAID, timeout=_BOUND).text == "4242 4242"


@pytest.mark.walls("vm")
def test_a_held_call_is_refused_after_the_way_back(vmm: VMM, parent: Machine) -> None:
    """Restored from a snapshot of that instant, or suspended: who waited is told, and the program gets an answer."""
    with held(parent) as (_, process):
        parent.snapshot("held", memory=True)
        parent.restore("held")
        assert parent.exec(_SAID, timeout=_BOUND).text == "-1 -1"
        with pytest.raises(GuestGone):
            process.wait(_BOUND)
    with held(parent) as (_, process):
        parent.suspend()
        with pytest.raises(GuestGone):
            process.wait(_BOUND)
        parent.resume()
        assert parent.exec(_SAID, timeout=_BOUND).text == "-1 -1"


@pytest.mark.walls("vm")
def test_handlers_of_this_process_answer_for_the_copies(vmm: VMM, parent: Machine) -> None:
    """Of the fork's maker, also where carriers of the parent's rest in the copy; a snapshot has rules alone."""
    policy = Policy()
    policy.on("getpgid")(lambda call: call.returns(4343))
    asks = ["python3", "-c", "import os; print(os.getpgid(0) == 4343)"]
    parent.syscalls.use(policy)
    try:
        assert parent.exec(asks, timeout=_BOUND, check=True).text == "True\n"
        child = parent.fork()[0]
        for machine in (child, parent):
            assert machine.exec(asks, timeout=_BOUND, check=True).text == "True\n"
        child.delete(force=True)
        parent.snapshot("ruled", memory=True)
    finally:
        parent.syscalls.use(None)
    with vmm.run(snapshot=f"{parent.name}@ruled") as kid:
        assert kid.exec(asks, timeout=_BOUND, check=True).text == "False\n"
        assert kid.exec(["python3", "-c", "import os; print(os.getsid(0))"], timeout=_BOUND).text == "77\n"


@pytest.mark.walls("gvisor")
def test_a_published_port(vmm: VMM) -> None:
    """The child gets one of its own (on vm: test_vm_freeze.py); where runsc cannot, that is said, and nothing has happened."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve = "import socket; it = socket.create_server(('0.0.0.0', 80)); print(flush=True)\nwhile 1: it.accept()[0].sendall(b'here')"
    with vmm.run("debian", wall="gvisor", network="nat", ports={port: 80}) as machine:
        serving = machine.spawn(["python3", "-c", serve])
        serving.stdout.readline()
        machines = [machine]
        try:
            machines += machine.fork()
        except HostLacks as error:
            assert "files alone" in error.hint
        else:
            assert machine.spec.ports != machines[1].spec.ports
        for each in machines:
            with socket.create_connection(("127.0.0.1", *each.spec.ports), timeout=_BOUND) as client:
                assert client.recv(100) == b"here"
        for kid in machines[1:]:
            kid.delete(force=True)


@pytest.mark.walls("vm")
def test_volumes_are_refused_with_what_can_be_done(vmm: VMM, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    with vmm.run("debian", wall="vm", volumes={"/data": str(shared)}) as machine:
        for verb in (machine.fork, machine.suspend, lambda: machine.snapshot("all", memory=True)):
            with pytest.raises(UnsupportedByWall, match="volumes") as refused:
                verb()
            assert "memory=False" in refused.value.hint
        machine.exec("echo on > /data/on; echo kept > /root/kept", timeout=_BOUND, check=True)
        assert (shared / "on").read_text() == "on\n"
        assert machine.snapshot("files", memory=False).memory is False
        assert os.listdir(vmm.home / "tmp") == []


@pytest.mark.walls("vm")
def test_a_command_that_is_traced(parent: Machine) -> None:
    """It goes on in both. In the parent its calls go on coming; in the child nobody takes them, and it does not wait for that."""
    ended: list[object] = []

    def listen() -> None:
        ended.append(sum(1 for _ in trace) > 100)

    with parent.syscalls.trace(["sh", "-c", _TRACED], ["openat", "write", "read", "close", "fstat"], timeout=_BOUND) as trace:
        listening = threading.Thread(target=listen)
        listening.start()
        parent.exec("until test -s /run/turn; do sleep 0.02; done; " + _TURNS, timeout=_BOUND, check=True)
        child = parent.fork()[0]
        try:
            for machine in (child, parent):
                machine.exec(_TURNS, timeout=_BOUND, check=True)
        finally:
            child.delete(force=True)
            parent.exec("touch /run/enough")
            listening.join(_BOUND)
    assert ended == [True] and not listening.is_alive()


class Zeros(BlockDevice):
    """A disk of zeros, by a Python function."""

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)


@pytest.mark.walls("vm")
def test_devices_that_this_process_answers_for_are_refused_by_name(parent: Machine) -> None:
    """And once they are detached they are in nobody's way."""
    for name, device in {"zeros": Zeros(1 << 20), "shout": CharDevice(), "com": Serial()}.items():
        parent.devices.attach(device, name)
        for verb in (parent.fork, parent.suspend, lambda: parent.snapshot("all", memory=True)):
            with pytest.raises(UnsupportedByWall, match=f"attached to it, {name}") as refused:
                verb()
            assert "detach it" in refused.value.hint
        parent.devices.detach(name)
    child = parent.fork()[0]
    assert child.exec(["true"], timeout=_BOUND).ok and child.devices.list() == []
    child.delete(force=True)


@pytest.mark.walls("vm", "gvisor", "container")
def test_a_snapshot_amid_heavy_writes(vmm: VMM, parent: Machine, wall: str) -> None:
    """The files alone are a prefix of what was written, with all that had been synced; at rest, nothing is half there either."""
    with parent.spawn(["python3", "-c", _WRITES]) as writing:
        while int(acked := writing.stdout.readline()) < 10:
            pass
        taken = {quiesce: parent.snapshot(f"amid-{quiesce}", memory=False, quiesce=quiesce) for quiesce in (False, True)}
        writing.kill()
    for quiesce, kept in taken.items():
        with vmm.run(snapshot=kept.ref) as copy:
            data, state, whole = copy.files.read("/root/records"), int(copy.files.read_text("/root/state")), 0
            while data[whole * _RECORD : (whole + 1) * _RECORD] == (whole + 1).to_bytes(8, "little") * 2048:
                whole += 1
            assert whole >= state >= int(acked)
            torn = len(data) - whole * _RECORD
            assert torn == 0 if quiesce else torn <= _RECORD
            if wall == "vm":
                assert "EXT4-fs error" not in copy.exec("dmesg").text
