"""The verbs, one at a time: what each does, what it leaves, what it says when it may not."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fake_engine import FakeEngine, engine_pid, keeper_pid
from host_state import assert_nothing_left, processes
from machine_home import IMAGE, TestHome

from trivisor import (
    VMM,
    AlreadyExists,
    Busy,
    EngineError,
    GuestGone,
    HostLacks,
    InvalidSpec,
    InvalidState,
    Machine,
    NotFound,
    State,
    StorageError,
    UnsupportedByWall,
    WaitTimeout,
)
from trivisor.core.devices import Random
from trivisor.core.state import LEGAL


def test_a_whole_life(home: TestHome, vmm: VMM) -> None:
    machine = vmm.create(IMAGE, name="web", env={"COLOUR": "blue"}, labels={"team": "a"})
    assert (machine.state, machine.name, machine.wall) == (State.CREATED, "web", "vm")
    machine.start()
    assert machine.state is State.RUNNING
    assert machine.exec("echo $COLOUR").text == "blue\n"
    machine.pause()
    assert machine.state is State.PAUSED
    machine.resume()
    assert machine.exec(["cat"], stdin=b"still there").stdout == b"still there"
    machine.stop()
    info = machine.info()
    assert (info["state"], info["status"], info["reason"]) == ("stopped", 0, "stop")
    machine.start()
    assert machine.info()["reason"] == ""
    machine.stop()
    machine.delete()
    with pytest.raises(NotFound):
        _ = machine.state
    assert vmm.list() == []
    kinds = [event.kind for event in vmm.events()]
    assert kinds == ["image-imported", "created", "started", "paused", "resumed", "stopped", "started", "stopped", "deleted"]
    assert_nothing_left(home.root, set())


def test_a_context_leaves_nothing(home: TestHome, vmm: VMM) -> None:
    with vmm.run(IMAGE) as machine:
        assert machine.exec(["true"]).exit_code == 0
        assert machine.spec.lifetime == "process"
    assert vmm.list() == []
    assert_nothing_left(home.root, set())
    with pytest.raises(RuntimeError, match="mine"), vmm.run(IMAGE):
        raise RuntimeError("mine")
    assert_nothing_left(home.root, set())
    with vmm.run(IMAGE) as machine:
        machine.delete(force=True)
    assert_nothing_left(home.root, set())


def test_getting(vmm: VMM) -> None:
    web, db = vmm.create(IMAGE, name="web"), vmm.create(IMAGE, name="db", labels={"tier": "data"})
    assert vmm.get("web").id == vmm.get(web.id).id == web.id
    assert vmm.get(db.id[:8]).id == db.id
    with pytest.raises(NotFound, match="there is no machine"):
        vmm.get("nothing")
    assert [machine.name for machine in vmm.list()] == ["web", "db"]
    assert [machine.name for machine in vmm.list(labels={"tier": "data"})] == ["db"]


def test_machines_of_one_manager_share_a_line(vmm: VMM, running: Machine) -> None:
    assert running.exec(["true"]).exit_code == 0
    before = set(threading.enumerate())
    for _ in range(20):
        assert vmm.get(running.name).exec(["true"]).exit_code == 0
    assert set(threading.enumerate()) <= before
    process = running.spawn(["cat"])
    vmm.close()
    with pytest.raises(GuestGone):
        process.wait(10)
    assert running.exec(["true"]).exit_code == 0  # opened again


def test_names_are_made_up_and_unique(vmm: VMM) -> None:
    names = {vmm.create(IMAGE).name for _ in range(10)}
    assert len(names) == 10


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"image": "unknown"}, NotFound),
        ({"name": "Not A Name"}, InvalidSpec),
        ({"memory": "lots"}, InvalidSpec),
        ({"cpus": 1000}, InvalidSpec),
        ({"colour": "red"}, InvalidSpec),
        ({"wall": "gvisor"}, UnsupportedByWall),
        ({"wall": "container"}, UnsupportedByWall),
        ({"wall": "paper"}, InvalidSpec),
        ({"kernel": "/no/such/kernel"}, HostLacks),
    ],
    ids=repr,
)
def test_what_cannot_be_created(home: TestHome, vmm: VMM, wishes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        vmm.create(**{"image": IMAGE, **wishes})  # type: ignore[arg-type]
    assert vmm.list() == []
    assert_nothing_left(home.root, set())


def test_a_name_that_is_taken(home: TestHome, vmm: VMM) -> None:
    first = vmm.create(IMAGE, name="web")
    with pytest.raises(AlreadyExists):
        vmm.create(IMAGE, name="web")
    assert_nothing_left(home.root, {first.id})


@pytest.mark.parametrize("step", ["disk", "disk formatted"])
def test_a_create_that_fails_leaves_nothing(home: TestHome, step: str) -> None:
    with home.open(FakeEngine(fail=step)) as vmm:
        with pytest.raises(EngineError, match="last words"):
            vmm.create(IMAGE, name="web")
        assert vmm.list() == []
        assert_nothing_left(home.root, set())
        vmm.create(IMAGE, name="web")


@pytest.mark.parametrize("step", ["control socket", "keeper spawned", "guest answered"])
def test_a_start_that_fails_leaves_the_machine_as_it_was(home: TestHome, step: str) -> None:
    engine = FakeEngine()
    with home.open(engine) as vmm:
        machine = vmm.create(IMAGE)
        for state in (State.CREATED, State.STOPPED):
            engine.fail = step
            with pytest.raises(EngineError):
                machine.start()
            assert machine.state is state
            assert machine.info()["operation"] == ""
            assert_nothing_left(home.root, {machine.id})
            machine.start()
            machine.stop()


def test_ctrl_c_in_a_start_is_undone(home: TestHome) -> None:
    with home.open(FakeEngine(delay=30)) as vmm:
        machine = vmm.create(IMAGE)

        def interrupt() -> None:
            _wait_engine(home.folder(machine))
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            machine.start()
        interrupter.join()
        assert machine.state is State.CREATED
        assert_nothing_left(home.root, {machine.id})


@pytest.mark.parametrize("state", ["created", "running", "paused", "stopped"])
def test_verbs_that_are_illegal_change_nothing(request: pytest.FixtureRequest, state: str) -> None:
    machine: Machine = request.getfixturevalue(state)
    verbs = {
        "start": machine.start, "pause": machine.pause, "resume": machine.resume, "stop": machine.stop, "delete": machine.delete,
        "exec": lambda: machine.exec(["true"]), "spawn": lambda: machine.spawn(["true"]), "files": lambda: machine.files.exists("/"),
        "forward": lambda: machine.forward(80), "stats": machine.stats,
        "network": lambda: machine.network.reshape(), "capture": lambda: machine.network.capture("/dev/null"),
        "memory": machine.memory.stats, "limit": lambda: machine.memory.limit("256M"),
        "modify": lambda: machine.modify(memory="256M"), "dedupe": machine.memory.dedupe, "commit": machine.commit,
        "attach": lambda: machine.devices.attach(Random()), "detach": lambda: machine.devices.detach("none"),
        "snapshot": lambda: machine.snapshot("none"), "suspend": machine.suspend, "fork": machine.fork,
        "restore": lambda: machine.restore("none"), "migrate": lambda: machine.migrate("unix:/none"),
    }  # fmt: skip
    assert {*verbs, "snapshot with memory"} == LEGAL.keys()
    before = machine.info()
    for verb, call in verbs.items():
        if state in LEGAL[verb]:
            continue
        with pytest.raises(InvalidState) as caught:
            call()
        assert (caught.value.verb, caught.value.state) == (verb, state)
        assert machine.info() == before


@pytest.mark.parametrize("state", ["created", "running", "paused", "stopped"])
def test_delete_by_force_in_every_state(request: pytest.FixtureRequest, home: TestHome, state: str) -> None:
    machine: Machine = request.getfixturevalue(state)
    machine.delete(force=True)
    with pytest.raises(NotFound):
        machine.info()
    assert_nothing_left(home.root, set())


def test_a_paused_machine_is_frozen_and_stops(running: Machine) -> None:
    ticking = running.spawn("while sleep 0.01; do date +%s%N; done")
    assert ticking.stdout.read(10)
    running.pause()
    folder = Path(running.info()["folder"])
    assert (Path("/proc") / str(engine_pid(folder)) / "stat").read_text().split()[2] == "T"
    assert running.stats().guest == {}
    running.stop()
    assert running.info()["status"] == 0


def test_stop_at_once(running: Machine) -> None:
    running.stop(timeout=0)
    assert (running.state, running.info()["status"]) == (State.STOPPED, None)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_stop_refuses_a_timeout_that_is_none(running: Machine, timeout: float) -> None:
    with pytest.raises(InvalidSpec):
        running.stop(timeout)
    assert running.state is State.RUNNING


def test_the_engine_is_killed_while_running(home: TestHome, running: Machine) -> None:
    os.kill(engine_pid(home.folder(running)), signal.SIGKILL)
    assert running.wait(10) is None
    assert running.state is State.FAILED
    assert running.info()["reason"] == "its engine was killed by signal 9"
    with pytest.raises(InvalidState):
        running.exec(["true"])
    assert_nothing_left(home.root, {running.id})
    running.start()
    assert running.exec(["true"]).exit_code == 0


def test_the_engine_is_killed_while_paused(home: TestHome, paused: Machine) -> None:
    os.kill(engine_pid(home.folder(paused)), signal.SIGKILL)
    paused.wait(10)
    assert paused.state is State.FAILED
    paused.start()


def test_the_engine_is_killed_while_starting(home: TestHome) -> None:
    with home.open(FakeEngine(delay=1.0)) as vmm:
        machine = vmm.create(IMAGE)
        folder = home.folder(machine)

        def kill() -> None:
            _wait_engine(folder)
            os.kill(engine_pid(folder), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        # The engine of these tests does not look again after its delay; the record does.
        machine.start()
        killer.join()
        machine.wait(30)
        assert machine.state is State.FAILED
        assert_nothing_left(home.root, {machine.id})


def test_the_engine_is_killed_during_pause(home: TestHome, engine: FakeEngine, running: Machine) -> None:
    os.kill(engine_pid(home.folder(running)), signal.SIGKILL)
    with pytest.raises((EngineError, InvalidState)):
        running.pause()
    running.wait(10)
    assert running.state is State.FAILED


def test_a_pause_that_fails_leaves_it_running(engine: FakeEngine, running: Machine) -> None:
    engine.fail = "signal"
    with pytest.raises(EngineError):
        running.pause()
    assert (running.state, running.info()["operation"]) == (State.RUNNING, "")
    assert running.exec(["true"]).exit_code == 0


def test_the_keeper_is_killed(home: TestHome, running: Machine) -> None:
    engine = engine_pid(home.folder(running))
    os.kill(keeper_pid(home.folder(running)), signal.SIGKILL)
    running.wait(10)
    assert (running.state, running.info()["reason"]) == (State.FAILED, "its keeper was killed")
    deadline = time.monotonic() + 5
    while Path(f"/proc/{engine}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert_nothing_left(home.root, {running.id})
    running.start()


def test_the_guest_powers_itself_off(home: TestHome, running: Machine) -> None:
    with suppress(GuestGone):  # it may go before it has said how the command ended
        running.exec(["kill", "-TERM", str(engine_pid(home.folder(running)))])
    assert running.wait(20) == 0
    assert (running.state, running.info()["reason"]) == (State.STOPPED, "the guest powered off")


def test_waiting_is_bounded(running: Machine) -> None:
    with pytest.raises(WaitTimeout):
        running.wait(0.1)


def test_a_command_under_way_when_the_machine_goes(running: Machine) -> None:
    process = running.spawn(["sleep", "60"])
    stopper = threading.Timer(0.2, running.stop, (0,))
    stopper.start()
    with pytest.raises(GuestGone):
        process.wait(30)
    stopper.join()


def test_a_command_that_comes_while_the_guest_powers_off(running: Machine) -> None:
    process = running.spawn("trap '' TERM; echo on; exec sleep 60")
    assert process.stdout.readline() == b"on\n"
    stopper = threading.Thread(target=running.stop)
    stopper.start()
    deadline = time.monotonic() + 30
    with pytest.raises((GuestGone, InvalidState)):
        while time.monotonic() < deadline:
            running.exec(["true"])
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)  # for the guest waits for it
    stopper.join()
    assert running.info()["status"] == 0


def test_busy_names_the_operation(home: TestHome) -> None:
    go = threading.Event()

    class Waiting(FakeEngine):
        def _step(self, name: str) -> None:
            if name == "guest answered":
                go.wait(60)

    with home.open(Waiting()) as vmm:
        machine = vmm.create(IMAGE)
        starter = threading.Thread(target=machine.start)
        starter.start()
        try:
            deadline = time.monotonic() + 30
            while machine.info()["operation"] != "start" and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(Busy) as caught:
                machine.stop()
            assert "start" in caught.value.operation
            assert machine.state is State.CREATED
        finally:
            go.set()
            starter.join()
        assert machine.state is State.RUNNING


def test_a_forced_delete_ends_a_start_under_way(home: TestHome) -> None:
    with home.open(FakeEngine(delay=1)) as vmm:
        machine = vmm.create(IMAGE)
        starter = threading.Thread(target=_ignore_errors, args=(machine,))
        starter.start()
        deadline = time.monotonic() + 10
        while not processes(home.root) and time.monotonic() < deadline:
            time.sleep(0.01)
        machine.delete(force=True)
        starter.join()
        assert vmm.list() == []
        assert_nothing_left(home.root, set())


def _wait_engine(folder: Path) -> None:
    """Wait until the engine of the machine that is being started runs."""
    deadline = time.monotonic() + 20
    while not (folder / "engine").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _ignore_errors(machine: Machine) -> None:
    try:
        machine.start()
    except (EngineError, NotFound, StorageError):
        return


def test_ttl_and_idle(vmm: VMM) -> None:
    """Both at once, and long enough for a start that is late."""
    machines = {wish: vmm.create(IMAGE, **{wish: "1500ms"}) for wish in ("ttl", "idle")}
    for machine in machines.values():
        machine.start()
    for wish, machine in machines.items():
        machine.wait(30)
        assert (machine.state, machine.info()["reason"]) == (State.STOPPED, wish)


def test_stats_of_both_sides(running: Machine) -> None:
    stats = running.stats()
    assert stats.private > 0
    assert stats.guest["memory_total"] > 0


def test_walls(vmm: VMM) -> None:
    walls = {report.wall: report for report in vmm.walls()}
    assert walls.keys() == {"vm", "gvisor", "container"}
    assert walls["vm"].available
    assert walls["container"].why
