"""Snapshots, restore, suspend and fork as records and folders have them; the fake engine's memory is a word (frozen_engine.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from frozen_engine import FreezingEngine, disk, mind, think, warm, write
from host_state import assert_nothing_left
from machine_home import IMAGE, TestHome

from trivisor import VMM, AlreadyExists, EngineError, HostLacks, InvalidSpec, InvalidState, Machine, NotFound, State


@pytest.fixture
def engine() -> FreezingEngine:
    return FreezingEngine()


@pytest.fixture
def vmm(home: TestHome, engine: FreezingEngine) -> Iterator[VMM]:
    with home.open(engine) as opened:
        yield opened


@pytest.fixture
def web(vmm: VMM, home: TestHome) -> Machine:
    return warm(vmm, home, b"files")


def frozen(home: TestHome) -> set[str]:
    place = home.root / "snapshots"
    return {entry.name for entry in place.iterdir()} - {"packs"} if place.exists() else set()


def test_back_to_what_it_was(vmm: VMM, home: TestHome, web: Machine) -> None:
    taken = web.snapshot("ready", note="after the warm-up", tags=["warm"])
    assert web.state is State.RUNNING
    assert (taken.ref, taken.memory, taken.note, taken.tags) == ("web@ready", True, "after the warm-up", ("warm",))
    assert [one.ref for one in vmm.snapshots.list()] == ["web@ready"]
    folder = home.folder(web)
    think(folder, b"confused")
    write(folder, b"spoilt")
    web.restore("ready")
    assert (web.state, mind(folder), disk(folder)) == (State.RUNNING, b"warm", b"files")
    assert web.info()["facts"]["other"] == "False"
    assert web.exec(["echo", "a new line"]).text == "a new line\n"


def test_without_memory(vmm: VMM, home: TestHome, web: Machine) -> None:
    web.stop()
    with pytest.raises(InvalidState, match="with memory"):
        web.snapshot("none", memory=True)
    assert not web.snapshot("clean").memory
    web.start()
    assert web.snapshot("files", memory=False).memory is False
    write(home.folder(web), b"spoilt")
    think(home.folder(web), b"warm")
    web.restore("clean")
    assert (mind(home.folder(web)), disk(home.folder(web))) == (b"", b"files")
    child = vmm.create(snapshot="web@clean", name="child")
    assert (child.state, disk(home.folder(child))) == (State.CREATED, b"files")
    child.start()


def test_a_machine_from_a_snapshot(vmm: VMM, home: TestHome, web: Machine) -> None:
    web.snapshot("ready")
    web.delete(force=True)
    child = vmm.create(snapshot="web@ready", name="child", labels={"a": "b"})
    assert (child.state, child.spec.labels, child.spec.memory) == (State.CREATED, {"a": "b"}, vmm.snapshots.get("web@ready") and 256 << 20)
    for call in (lambda: child.modify(memory="512M"), lambda: child.snapshot("early"), lambda: child.commit("early")):
        with pytest.raises(InvalidSpec, match="still to go on"):
            call()
    child.start()
    assert (mind(home.folder(child)), child.info()["facts"]["other"]) == (b"warm", "True")
    child.stop()
    child.start()
    assert mind(home.folder(child)) == b""  # from its disk
    with vmm.run(snapshot="web@ready") as other:
        assert mind(home.folder(other)) == b"warm"
    for wrong in ({"image": IMAGE}, {"memory": "128M"}, {"wall": "container"}):
        with pytest.raises(InvalidSpec):
            vmm.create(**{"snapshot": "web@ready", **wrong})  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        vmm.create(snapshot="web@never")
    with pytest.raises(InvalidSpec):
        vmm.create()


def test_what_is_removed_stays_for_who_needs_it(vmm: VMM, home: TestHome, web: Machine) -> None:
    taken = web.snapshot("ready")
    with pytest.raises(AlreadyExists):
        web.snapshot("ready")
    child = vmm.create(snapshot="web@ready")
    vmm.snapshots.remove("web@ready")
    assert vmm.snapshots.list() == []
    assert frozen(home) == {taken.id}
    child.start()
    assert mind(home.folder(child)) == b"warm"
    web.snapshot("ready")
    child.delete(force=True)
    assert taken.id not in frozen(home)
    vmm.snapshots.remove("web@ready")
    assert frozen(home) == set()
    # The image is let go of with the last that needs it.
    web.delete(force=True)
    vmm.images.remove(IMAGE)


def test_an_image_that_a_snapshot_needs(vmm: VMM, web: Machine) -> None:
    web.snapshot("ready")
    web.delete(force=True)
    with pytest.raises(Exception, match="snapshot:"):
        vmm.images.remove(IMAGE)


def test_suspend_and_resume(vmm: VMM, home: TestHome, web: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    web.suspend()
    assert web.state is State.SUSPENDED
    assert_nothing_left(home.root, {web.id})
    for verb in ("start", "pause", "suspend", "exec", "fork"):
        with pytest.raises(InvalidState):
            getattr(web, verb)(*(["true"] if verb == "exec" else []))
    monkeypatch.setattr("trivisor.core.process.boot_id", lambda: "another boot")
    with home.open(FreezingEngine()) as other:
        assert other.get("web").state is State.SUSPENDED
    web.resume()
    assert (web.state, mind(home.folder(web))) == (State.RUNNING, b"warm")
    web.pause()
    web.suspend()
    web.stop()
    assert (web.state, web.info()["reason"]) == (State.STOPPED, "its memory was dropped")
    web.start()
    assert mind(home.folder(web)) == b""
    web.delete(force=True)
    assert frozen(home) == set()


def test_a_suspend_that_fails(home: TestHome, engine: FreezingEngine, web: Machine) -> None:
    engine.fail = "frozen"
    with pytest.raises(EngineError):
        web.suspend()
    assert (web.state, web.info()["ice"]) == (State.RUNNING, "")
    assert frozen(home) == set()
    assert web.exec(["true"]).exit_code == 0


def test_fork(vmm: VMM, home: TestHome, web: Machine) -> None:
    one, two = web.fork(2)
    assert (one.name, two.name) == ("web-1", "web-2")
    (three,) = one.fork(1, names=["deep"])
    (four,) = three.fork()
    assert four.name == "deep-1"
    for child in (one, two, three, four):
        assert (child.state, mind(home.folder(child))) == (State.RUNNING, b"warm")
        assert child.exec(["echo", child.name]).text == f"{child.name}\n"
    assert web.exec(["true"]).exit_code == 0
    assert len(frozen(home)) == 3
    assert vmm.snapshots.list() == []
    with pytest.raises(AlreadyExists):
        web.fork(names=["deep"])
    with pytest.raises(InvalidSpec):
        web.fork(0)
    for child in (one, two, three, four):
        child.delete(force=True)
    assert frozen(home) == set()


def test_who_stopped_runs_from_it_no_more(vmm: VMM, home: TestHome, web: Machine) -> None:
    one, two = web.fork(2)
    one.stop()
    assert len(frozen(home)) == 1
    two.suspend()
    assert len(frozen(home)) == 2  # what it ran from, and what it is suspended in
    two.stop()
    assert frozen(home) == set()
    one.start()
    two.start()


def test_a_fork_that_fails_leaves_nothing(vmm: VMM, home: TestHome, engine: FreezingEngine, web: Machine) -> None:
    engine.fail = "thaw"
    with pytest.raises(EngineError):
        web.fork(3)
    assert [machine.name for machine in vmm.list()] == ["web"]
    assert frozen(home) == set()
    assert web.exec(["true"]).exit_code == 0


def test_published_ports(vmm: VMM, web: Machine) -> None:
    web.stop()
    port = vmm.create(IMAGE, name="served", network="nat", ports={18080: 80})
    port.start()
    one, two = port.fork(2)
    assert list(one.spec.ports.values()) == list(two.spec.ports.values()) == [80]
    assert len({*port.spec.ports, *one.spec.ports, *two.spec.ports}) == 3


def test_a_host_that_does_not_fit(home: TestHome, engine: FreezingEngine, web: Machine, vmm: VMM) -> None:
    web.snapshot("ready")
    engine.here = "two"
    started = web.info()["started"]
    with pytest.raises(HostLacks, match="one"):
        web.restore("ready")
    assert (web.state, web.info()["started"]) == (State.RUNNING, started)
    with pytest.raises(HostLacks):
        vmm.create(snapshot="web@ready", name="child")
    assert [machine.name for machine in vmm.list()] == ["web"]


def test_a_restore_that_fails_can_be_tried_again(home: TestHome, engine: FreezingEngine, web: Machine) -> None:
    web.snapshot("ready")
    engine.fail = "thaw"
    with pytest.raises(EngineError):
        web.restore("ready")
    assert (web.state, web.info()["operation"]) == (State.FAILED, "")
    assert "web@ready" in web.info()["reason"]
    web.start()
    assert mind(home.folder(web)) == b"warm"


def test_time_to_live(vmm: VMM, home: TestHome, web: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    web.snapshot("short", ttl="1m")
    web.snapshot("kept", ttl="1m", keep=True)
    web.snapshot("long")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert [one.name for one in vmm.snapshots.list()] == ["kept", "long"]
    assert web.snapshot("short").ref == "web@short"
    monkeypatch.setattr(time, "time", lambda: now)
    with home.open(FreezingEngine()) as other:
        assert len(other.snapshots.list("web")) == 3


def test_wrong_words(web: Machine) -> None:
    for name in ("", "a b", "a@b", "x" * 64, "../x"):
        with pytest.raises(InvalidSpec):
            web.snapshot(name)
    with pytest.raises(InvalidSpec):
        web.snapshot("a", note="x" * 5000)
    with pytest.raises(InvalidSpec):
        web.snapshot("a", tags=[""])
    with pytest.raises(InvalidSpec):
        web.snapshot("a", ttl=-1)


def test_parents(vmm: VMM, web: Machine, tmp_path: Path) -> None:
    web.snapshot("a")
    web.snapshot("b")
    web.restore("a")
    web.snapshot("c")
    (child,) = web.fork()
    child.snapshot("d")
    vmm.create(snapshot="web@b", name="other").start()
    vmm.get("other").snapshot("e")
    assert {one.name: one.parent for one in vmm.snapshots.list()} == {"a": "", "b": "web@a", "c": "web@a", "d": "web@c", "e": "web@b"}
