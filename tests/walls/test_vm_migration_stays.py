"""A virtual machine that is not moved, or whose move is cut short: it goes on here, or it is there, never both."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from images_for_tests import mini_image
from machine_home import KILLED, VmHome, in_child
from migrating import DOWNTIME, SHELL, Elsewhere, count, counts_on, receiving, until
from wall_fixtures import Make

from trivisor import VMM, EngineError, InvalidSpec, Machine, MigrationError, State, UnsupportedByWall
from trivisor.core.devices import Random
from trivisor.core.paths import Home
from trivisor.vmm import reconcile
from trivisor.vmm.engines.vm import migrating
from trivisor.vmm.engines.vm.engine import VmEngine
from trivisor.vmm.migration import link as links
from trivisor.vmm.migration import source, target
from trivisor.vmm.migration.link import Link
from trivisor.vmm.migration.messages import Go, Message
from trivisor.vmm.migration.source import MigrationProgress

TOKEN = "a token that only this test knows"


@pytest.fixture(scope="module")
def there(iced_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    other = Elsewhere(tmp_path_factory.mktemp("there") / "home", iced_home, images=False)
    yield other
    other.clear()


@pytest.fixture(scope="module")
def stayer(wall_home: VmHome) -> Iterator[Machine]:
    """One machine that counts, and that each test leaves running here."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("mini", wall="vm", name="stayer", disk="64M")
        machine.start()
        machine.spawn(SHELL, detach=True)
        until(lambda: machine.files.exists("/run/count"))
        yield machine
        for left in vmm.list():
            if left.id == machine.id:
                left.delete(force=True)


def goes_on(machine: Machine) -> None:
    assert machine.state is State.RUNNING
    counts_on(machine, count(machine))


def nothing_came(home: Elsewhere) -> None:
    with VMM(home.root) as vmm:
        assert not vmm.list()
    assert not list((home.root / "machines").iterdir())


def test_a_target_that_refuses_says_why(stayer: Machine, there: Elsewhere) -> None:
    with VMM(there.root) as vmm:
        mini_image(Home(there.root), "other")
        other = vmm.create("other", wall="vm", name="stayer")
        with receiving(there.root, token=TOKEN) as home:
            with pytest.raises(MigrationError, match="there is a machine named stayer") as refused:
                stayer.migrate(home.address, token=TOKEN, downtime=DOWNTIME)
            assert refused.value.where == "here" and "another name" in refused.value.hint
        other.delete()
    goes_on(stayer)
    with pytest.raises(MigrationError, match="nobody can be reached"):
        stayer.migrate(home.address, token=TOKEN, downtime=DOWNTIME)


def test_a_host_that_is_another_says_so(stayer: Machine, there: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made there, and before anything is sent."""
    known = migrating.describe(stayer._context.box(stayer._row()))

    def other(**changes: object) -> str:
        monkeypatch.setattr(VmEngine, "leaving", lambda _self, _box: msgspec.structs.replace(known, **changes))
        with receiving(there.root, token=TOKEN) as home, pytest.raises(MigrationError) as refused:
            stayer.migrate(home.address, token=TOKEN, downtime=DOWNTIME)
        return str(refused.value)

    assert "it runs with qemu other, and here is" in other(needs={**known.needs, "qemu": "other"})
    assert "not byte for byte" in other(root="other")
    assert "other hardware" in other(words="other")
    monkeypatch.undo()
    nothing_came(there)
    goes_on(stayer)


def test_it_is_cancelled_or_takes_too_long(stayer: Machine, wall_home: VmHome, there: Elsewhere) -> None:
    with receiving(there.root, token=TOKEN) as home:
        moving = stayer.migrate(home.address, token=TOKEN, downtime=DOWNTIME, rate="1M", wait=False)
        until(lambda: moving.progress.phase == "memory" and moving.progress.done > 1 << 20)
        moving.cancel()
        with pytest.raises(MigrationError, match="cancelled"):
            moving.wait(60)
    goes_on(stayer)
    with receiving(there.root, token=TOKEN) as home, pytest.raises(MigrationError, match="could not be moved"):
        stayer.migrate(home.address, token=TOKEN, downtime=1.0, timeout=1.0, rate="1M")
    goes_on(stayer)
    nothing_came(there)
    with VMM(wall_home.root) as vmm:
        assert [event.kind for event in vmm.events() if event.machine == stayer.id][-2:] == ["stayed", "stayed"]


def test_what_cannot_be_moved_says_why(stayer: Machine, tmp_path: Path) -> None:
    at = f"unix:{tmp_path / 'nobody'}"
    stayer.devices.attach(Random(), name="dice")
    try:
        with pytest.raises(InvalidSpec, match="its device dice"):
            stayer.migrate(at, downtime=DOWNTIME)
    finally:
        stayer.devices.detach("dice")
    if int(stayer.info()["facts"]["qemu"].partition(".")[0]) < 9 and "tcg" in stayer.info()["facts"]["accelerator"]:
        with pytest.raises(InvalidSpec, match="it must stand still") as refused:
            stayer.migrate(at)
        assert "downtime of 2 s" in refused.value.hint
    with pytest.raises(InvalidSpec):
        stayer.migrate(at, downtime=0)
    goes_on(stayer)


@pytest.mark.walls("container", "gvisor")
def test_walls_that_cannot(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedByWall, match="move machines"):
        make("mini").migrate(f"unix:{tmp_path / 'nobody'}")


def test_a_target_that_fails_after_it_took_it_gives_it_back(stayer: Machine, there: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise EngineError("the last step failed")

    monkeypatch.setattr(target.provide, "settle", fail)
    with receiving(there.root, token=TOKEN) as home:
        with pytest.raises(MigrationError, match="the last step failed") as failed:
            stayer.migrate(home.address, token=TOKEN, downtime=DOWNTIME)
        with pytest.raises(EngineError):
            home.machine()
    assert failed.value.where == "here"
    goes_on(stayer)
    nothing_came(there)


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["disk", "memory"])
def test_a_target_that_hangs_is_given_up(
    stayer: Machine, there: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    address = tmp_path / "address"

    def listening(where: str) -> None:
        address.with_suffix(".new").write_text(where)
        address.with_suffix(".new").rename(address)

    def work() -> None:
        with VMM(there.root) as vmm:
            vmm.receive("127.0.0.1:0", token=TOKEN, timeout=30, listening=listening)

    child = os.fork()
    if child == 0:
        os._exit(in_child(work) and 0)
    until(address.exists)
    (worker,) = (int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split())
    monkeypatch.setattr(links, "SILENCE", 7.0)

    def stop(progress: MigrationProgress) -> None:
        if progress.phase == phase:
            os.kill(worker, signal.SIGSTOP)

    try:
        with pytest.raises(MigrationError) as given_up:
            stayer.migrate(address.read_text(), token=TOKEN, downtime=DOWNTIME, progress=stop)
    finally:
        os.kill(worker, signal.SIGCONT)
        os.waitpid(child, 0)
    assert given_up.value.where == "here"
    goes_on(stayer)
    nothing_came(there)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(home: VmHome, name: str, address: str, phase: str) -> Callable[[], None]:
    """A source that is killed in a phase, or when it gave the machine up."""

    def look(progress: MigrationProgress) -> None:
        if progress.phase == phase:
            die()

    def work() -> None:
        if phase == "go":
            send = Link.send

            def give_up(link: Link, message: Message) -> None:
                if isinstance(message, Go):
                    die()
                send(link, message)

            source.Link.send = give_up  # type: ignore[method-assign]
        with VMM(home.root) as vmm:
            vmm.get(name).migrate(address, token=TOKEN, downtime=DOWNTIME, progress=look)

    return work


@pytest.mark.parametrize(
    "phase", ["disk", pytest.param("memory", marks=pytest.mark.soak), pytest.param("handover", marks=pytest.mark.soak)]
)
def test_a_killed_source_s_machine_goes_on(stayer: Machine, wall_home: VmHome, there: Elsewhere, phase: str) -> None:
    with receiving(there.root, token=TOKEN) as home:
        assert in_child(dying(wall_home, "stayer", home.address, phase)) == KILLED
        with pytest.raises(MigrationError):
            home.machine()
    goes_on(stayer)
    nothing_came(there)


@pytest.mark.soak
def test_one_killed_as_it_gives_up_stands_still(stayer: Machine, wall_home: VmHome, there: Elsewhere) -> None:
    with receiving(there.root, token=TOKEN) as home:
        assert in_child(dying(wall_home, "stayer", home.address, "go")) == KILLED
        with pytest.raises(MigrationError):
            home.machine()
    assert (stayer.state, stayer.info()["reason"]) == (State.PAUSED, reconcile.GIVEN_UP)
    nothing_came(there)
    stayer.resume()
    goes_on(stayer)


@pytest.mark.parametrize(
    "step", [pytest.param("ready", marks=pytest.mark.soak), "loaded", pytest.param("gone_on", marks=pytest.mark.soak), "settled"]
)
def test_a_killed_target(stayer: Machine, there: Elsewhere, tmp_path: Path, step: str) -> None:
    """Before it took the machine, before it heard of its guest, and after that: the last test here, in which the machine leaves."""
    address = tmp_path / "address"

    def work() -> None:
        def then(*_: object) -> None:
            die()

        if step == "settled":
            target.provide.settle = then  # type: ignore[assignment]
        else:
            setattr(target._Arrival, step, then)

        def listening(where: str) -> None:
            address.with_suffix(".new").write_text(where)
            address.with_suffix(".new").rename(address)

        with VMM(there.root) as vmm:
            vmm.receive("127.0.0.1:0", token=TOKEN, timeout=30, listening=listening)

    before = count(stayer)
    child = os.fork()
    if child == 0:
        os._exit(0 if in_child(work) == KILLED else 1)
    until(address.exists)
    with pytest.raises(MigrationError) as caught:
        stayer.migrate(address.read_text(), token=TOKEN, downtime=DOWNTIME)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if step in ("ready", "loaded"):
        assert caught.value.where == "here"
        goes_on(stayer)
        nothing_came(there)
        return
    assert caught.value.where == "unknown" and "delete it here" in caught.value.hint
    assert (stayer.state, stayer.info()["reason"]) == (State.PAUSED, reconcile.GIVEN_UP)
    if step == "gone_on":
        with VMM(there.root) as vmm:
            for arrived in vmm.list():  # its guest was heard of before its receiver died
                arrived.delete(force=True)
        nothing_came(there)
        stayer.resume()
        goes_on(stayer)
        return
    with VMM(there.root) as vmm:
        arrived = vmm.get("stayer")
        assert arrived.state is State.RUNNING
        counts_on(arrived, before)
        stayer.delete(force=True)
        goes_on(arrived)
        assert vmm.images.get("mini").digest == arrived.info()["digest"]
