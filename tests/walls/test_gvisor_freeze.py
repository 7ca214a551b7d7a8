"""Freezing and thawing by runsc's checkpoint and restore, as the engine does it: each runsc, the same machine and another one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from machine_home import VmHome
from missing import lacks
from rootless_home import NOBODY, account, as_user, home_of
from test_gvisor import BOUND, binaries

from trivisor import VMM, GuestError, Machine, State
from trivisor.core.errors import EngineError, HostLacks, StorageError, UnsupportedByWall
from trivisor.core.paths import Home
from trivisor.core.undo import Undo
from trivisor.launch import keeper
from trivisor.vmm import frozen_layers
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.gvisor import control, freeze
from trivisor.vmm.engines.gvisor.engine import GvisorEngine
from trivisor.vmm.freezer import Freezer, Frozen

STATE = """
import os, socket, threading, time
server = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(server.getsockname())
far = server.accept()[0]
kept = open("/root/kept", "w+")
def answer():
    while True:
        far.sendall(far.recv(100).upper())
threading.Thread(target=answer, daemon=True).start()
os.mkfifo("/run/ask")
os.mkfifo("/run/say")
n = 0
names = {}
while True:
    with open("/run/ask") as ask:  # closed before the answer's end is seen: who asks next is to open it anew
        say = open("/run/say", "w")
        for line in ask:
            n += 1
            near.sendall(line.encode())
            kept.write(line)
            kept.flush()
            exec(line, names)
            print(n, near.recv(100).decode().strip(), os.path.getsize("/root/kept"), names.get("x"), file=say)
    say.close()
"""
"""A counter, an open file, a connection and what a REPL holds, asked through a pipe."""


def box(machine: Machine) -> Box:
    return machine._context.box(machine._context.row(machine.id))


def ask(machine: Machine, line: str) -> str:
    return machine.exec(["sh", "-c", 'echo "$1" > /run/ask & cat /run/say', "-", line], timeout=BOUND).text.strip()


@contextmanager
def machines(root: Path, binary: str | None = None) -> Iterator[tuple[VMM, GvisorEngine]]:
    engine = GvisorEngine(Home(root), binary)
    with VMM(root, engines=[engine]) as vmm:
        try:
            yield vmm, engine
        finally:
            for machine in vmm.list():
                machine.delete(force=True)


def busy(vmm: VMM, **spec: object) -> Machine:
    """A machine in which the program runs, asked once."""
    machine = vmm.create("debian", wall="gvisor", **spec)  # type: ignore[arg-type]
    machine.start()
    machine.files.write("/root/state.py", STATE.encode())
    machine.spawn(["python3", "/root/state.py"], detach=True)
    machine.exec("until test -p /run/say; do sleep 0.01; done", timeout=BOUND, check=True)
    assert ask(machine, "x = 41") == "1 X = 41 7 41"
    return machine


def frozen(engine: GvisorEngine, machine: Machine, into: Path, **how: bool) -> Frozen:
    into.mkdir()
    done = engine.freeze(box(machine), into, **{"memory": True, **how}, progress=print)  # type: ignore[arg-type]
    machine._context.lines.drop(machine.id)
    return done


def thawed(engine: GvisorEngine, machine: Machine, into: Path, *, other: bool) -> None:
    with Undo() as undo:
        facts = engine.thaw(box(machine), into, other=other, undo=undo, progress=print)
        undo.keep()
    machine._context.records.update(machine.id, state=State.RUNNING, facts=facts)


@pytest.fixture(autouse=True)
def available(wall_home: VmHome) -> None:
    with VMM(wall_home.root) as vmm:
        report = next(report for report in vmm.walls() if report.wall == "gvisor")
    if not report.available:
        lacks(f"needs the gvisor wall: {report.why} ({report.remedy})")


@pytest.mark.parametrize("binary", binaries())
def test_what_runs_goes_on_in_it_and_in_another(wall_home: VmHome, tmp_path: Path, binary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "frozen"
    synced: dict[str, bool] = {}
    with machines(wall_home.root, binary) as (vmm, engine):
        parent = busy(vmm, name="parent")
        for _ in range(12):
            parent.exec(["true"])  # of what these had runsc of 2022 tells once more when it has restored them
        parent.exec(
            "rm /etc/issue; mkdir -p /etc/trivisor/after-clone.d; printf '#!/bin/sh\\necho again >> /root/hooked' > "
            "/etc/trivisor/after-clone.d/1; chmod +x /etc/trivisor/after-clone.d/1",
            check=True,
        )
        where, sync = box(parent), freeze.sync
        ran = {True: lambda: not engine.paused(where), False: lambda: False}[freeze.goes_on(engine._found()[0])]
        monkeypatch.setattr(freeze, "sync", lambda path: (sync(path), synced.update({path.name: ran()})))
        said = frozen(engine, parent, into)
        monkeypatch.undo()
        assert {frozen_layers.TAR, freeze.MEMORY, freeze.TVINIT, into.name} < synced.keys()
        assert set(synced.values()) == {freeze.goes_on(engine._found()[0])}  # nobody waits for the disk who need not
        assert isinstance(engine, Freezer) and 0 < said.paused < BOUND
        assert ask(parent, "x += 1") == "2 X += 1 14 42"
        child = vmm.create("debian", wall="gvisor", name="child")
        engine.fits(box(child), said.needs)
        thawed(engine, child, into, other=True)
        assert ask(child, "x += 2") == "2 X += 2 14 43"
        assert child.exec("hostname; cat /etc/hostname").text == "child\nchild\n"
        assert child.exec("cat /etc/machine-id").text != parent.exec("cat /etc/machine-id").text
        assert not child.files.exists("/etc/issue")
        assert child.files.read_text("/root/hooked") == "again\n"
        assert not parent.files.exists("/root/hooked")
        random = "head -c 16 /dev/urandom | od -A n -t x1"
        assert child.exec(random).text != parent.exec(random).text
        assert abs(float(child.exec("date +%s.%N").text) - time.time()) < 5
        child.stop()
        child.start()  # its layer is its own
        assert child.files.read_text("/root/kept") == "x = 41\nx += 2\n"


def test_one_that_ends_goes_on_where_it_was(wall_home: VmHome, tmp_path: Path) -> None:
    into = tmp_path / "frozen"
    with machines(wall_home.root) as (vmm, engine):
        machine = busy(vmm)
        machine.pause()
        frozen(engine, machine, into, ends=True)
        assert not keeper.alive(box(machine).dir)
        (tmp_path / "frozen" / frozen_layers.TAR).unlink()  # we died before it was there
        thawed(engine, machine, into, other=False)
        assert ask(machine, "x += 1") == "2 X += 1 14 42"


def test_one_that_is_paused_still_is(wall_home: VmHome, tmp_path: Path) -> None:
    with machines(wall_home.root) as (vmm, engine):
        machine = busy(vmm)
        machine.pause()
        frozen(engine, machine, tmp_path / "frozen")
        assert machine.state is State.PAUSED and engine.paused(box(machine))
        machine.resume()
        assert ask(machine, "x += 1") == "2 X += 1 14 42"


@pytest.mark.parametrize("ends", [False, True])
def test_where_its_files_find_no_room_it_goes_on(wall_home: VmHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(frozen_layers, "keep", full)
    with machines(wall_home.root) as (vmm, engine):
        machine = busy(vmm)
        with pytest.raises(StorageError, match="no room"):
            frozen(engine, machine, tmp_path / "frozen", ends=ends)
        machine._context.lines.drop(machine.id)
        assert ask(machine, "x += 1") == "2 X += 1 14 42"


@pytest.mark.parametrize("binary", binaries())
@pytest.mark.parametrize("step", ["away", "checkpoint", "layer"])
def test_killed_while_it_freezes(wall_home: VmHome, monkeypatch: pytest.MonkeyPatch, binary: str, step: str) -> None:
    """Before the checkpoint, as it begins, and after it: the machine goes on, or is suspended."""

    def dies(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def begun(pid: int, *_: object, **__: object) -> list[str]:
        threading.Timer(0.05, dies).start()
        return real(pid, *_, **__)

    real = control.argv
    with machines(wall_home.root, binary) as (vmm, _):
        machine = busy(vmm)
        if not (pid := os.fork()):
            if step == "away":
                monkeypatch.setattr(freeze, "_until", dies)
            elif step == "layer":
                monkeypatch.setattr(frozen_layers, "keep", dies)
            else:  # it takes a while, in which the guest looks for its door
                monkeypatch.setattr(control, "_LAST", control._LAST.replace('"$@"', '/bin/sleep 0.3; "$@"'))
                monkeypatch.setattr(
                    control, "argv", lambda pid, command, *verb: (begun if "checkpoint" in verb else real)(pid, command, *verb)
                )
            try:
                machine.snapshot("cut", memory=True)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        deadline = time.monotonic() + BOUND
        while machine.info()["operation"]:  # what the dead one was just starting may hold its lock for an instant
            assert time.monotonic() < deadline
        if machine.state is State.SUSPENDED:
            machine.resume()
        assert machine.state is State.RUNNING
        machine._context.lines.drop(machine.id)
        assert ask(machine, "x += 1") == "2 X += 1 14 42"
        assert not any(kept.name == "cut" for kept in vmm.snapshots.list())


def test_files_alone(wall_home: VmHome, tmp_path: Path) -> None:
    """Of a running machine, into one with a disk of another shape; and of one that is stopped."""
    into, again = tmp_path / "frozen", tmp_path / "again"
    with machines(wall_home.root) as (vmm, engine):
        machine = vmm.create("debian", wall="gvisor")
        machine.start()
        machine.files.write("/root/note", b"first")
        machine.exec("rm -r /opt; mkdir /opt; chown 1234:77 /root/note; ln -s /root/note /opt/link", check=True)
        frozen(engine, machine, into, memory=False)
        machine.files.write("/root/note", b"second")
        machine.stop()
        frozen(engine, machine, again, memory=False)
        child = vmm.create("debian", wall="gvisor")
        for folder, note in ((into, "first"), (again, "second")):
            with Undo() as undo:
                engine.refill(box(child), folder, undo)
                undo.keep()
            child.start()
            assert child.files.read_text("/opt/link") == note
            look = "import os; about = os.stat('/root/note'); print(about.st_uid, about.st_gid, os.listdir('/opt'))"
            assert child.exec(["python3", "-c", look]).text == "1234 77 ['link']\n"
            child.stop()


def test_refused(wall_home: VmHome, tmp_path: Path) -> None:
    into = tmp_path / "frozen"
    with machines(wall_home.root) as (vmm, engine):
        machine = vmm.create("debian", wall="gvisor", disk="ram")
        machine.start()
        with pytest.raises(UnsupportedByWall):
            frozen(engine, machine, into)
        assert machine.exec("echo here").text == "here\n"
        machine = busy(vmm)
        held = machine.spawn(["sh", "-c", "exec 3> /root/held; rm /root/held; echo; exec cat"])
        held.stdout.readline()
        with pytest.raises(GuestError, match="holds /root/held, which was removed"):
            frozen(engine, machine, tmp_path / "again")
        held.kill()
        with machine.syscalls.trace("echo; cat /dev/zero", ["write"], timeout=60) as trace:
            next(iter(trace))
            with pytest.raises(GuestError, match="is traced") as refused:
                frozen(engine, machine, tmp_path / "traced")
            assert "end what traces them" in refused.value.hint
        assert ask(machine, "x += 1") == "2 X += 1 14 42"
        with pytest.raises(GuestError, match="at this instant") as refused, freeze._savable(box(machine)):
            raise EngineError("runsc failed", output="pkg/state.(*encodeState).Save(0xc00018e380)")
        assert "end the trace" in refused.value.hint
        with pytest.raises(HostLacks, match="runsc other"):
            engine.fits(box(machine), {"runsc": "other"})
        with pytest.raises(HostLacks, match="processor warp"):
            engine.fits(box(machine), {"processor": "warp"})


@pytest.mark.parametrize("binary", binaries())
def test_with_a_network_a_volume_and_a_disk_of_its_own_size(wall_home: VmHome, tmp_path: Path, binary: str) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    with machines(wall_home.root, binary) as (vmm, engine):
        found = engine.report().features
        network = "nat" if found["nat"] else "none"
        spec: dict[str, Any] = {"network": network, "volumes": {"/data": shared}, **({"disk": "64M"} if found["disk_size"] else {})}
        machine = busy(vmm, **spec)
        machine.exec("echo whole > /root/whole")
        with machine.spawn("exec 3>> /data/log; while read word; do echo $word >&3; done", pty=True):
            try:
                frozen(engine, machine, tmp_path / "frozen")
            except HostLacks as error:
                assert "20221219" in str(error) and machine.exec("true").exit_code == 0
                return
        child = vmm.create("debian", wall="gvisor", **spec)
        thawed(engine, child, tmp_path / "frozen", other=True)
        assert [ask(each, "x += 1") for each in (machine, child)] == ["2 X += 1 14 42"] * 2
        assert child.files.read_text("/root/whole") == "whole\n"
        ends = "import socket; one = socket.socket(type=socket.SOCK_DGRAM); one.connect(('192.0.2.1', 9)); print(one.getsockname()[0])"
        if network == "nat":
            said = {each.exec(["python3", "-c", ends], check=True).text.strip() for each in (machine, child)}
            assert said == {machine.info()["facts"]["address"], child.info()["facts"]["address"]}


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("ids", ["subordinate", "one"])
def test_for_an_ordinary_user(image_home: Path, ids: str) -> None:
    """With subordinate ids as for root; with one id runsc restores nothing, and that is said before anything is done."""
    with ExitStack() as stack:
        user = stack.enter_context(account()) if ids == "subordinate" else NOBODY
        home = stack.enter_context(home_of(user, image_home))

        def live() -> None:
            with machines(home) as (vmm, _):
                machine = busy(vmm)
                if ids == "one":
                    with pytest.raises(HostLacks, match="no ids beside root"):
                        machine.fork()
                    assert ask(machine, "x += 1") == "2 X += 1 14 42"
                    return
                child = machine.fork()[0]
                machine.suspend()
                machine.resume()
                assert [ask(each, "x += 1") for each in (machine, child)] == ["2 X += 1 14 42"] * 2

        as_user(user, live)
