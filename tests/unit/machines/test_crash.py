"""kill -9 at every step of create, start, stop and delete: the next VMM() leaves nothing behind and every machine usable.

Children are forked, and end themselves at the Nth undo point (core/undo.py, `observer`) or at the Nth write of a
record. So they also show that a fork of a process that has a home open harms nobody.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fake_engine import FakeEngine, keeper_pid
from host_state import assert_nothing_left
from machine_home import IMAGE, KILLED, TestHome, die_at_undo, in_child

from trivisor import VMM, EngineError, Machine, NotFound, State
from trivisor.core.process import Who
from trivisor.vmm import locks, reconcile, sweep
from trivisor.vmm.engine import Box
from trivisor.vmm.records import Records

NAME = "web"
MOST = 40


def die_at_write(number: int, *, after: bool) -> None:
    """Die before or after the Nth change of the records: between any two steps that are written down."""
    left = number
    update, remove, add = Records.update, Records.remove, Records.add

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    Records.update = counted(update)  # type: ignore[method-assign]
    Records.remove = counted(remove)  # type: ignore[method-assign]
    Records.add = counted(add)  # type: ignore[method-assign]


MEANS: dict[str, Callable[[int], None]] = {
    "undo": die_at_undo,
    "before-write": lambda number: die_at_write(number, after=False),
    "after-write": lambda number: die_at_write(number, after=True),
}


def each_death(home: TestHome, means: str, work: Callable[[VMM], object]) -> Iterator[int]:
    """Run `work` in children that die one step later each time; end with the one that lives through it."""
    for number in range(1, MOST):

        def child(number: int = number) -> None:
            with home.open() as vmm:
                MEANS[means](number)
                work(vmm)

        status = in_child(child)
        assert status in (0, KILLED)
        yield number
        if status == 0:
            assert number > 1, "no step was ever counted"
            return
    pytest.fail(f"over {MOST} steps")


def usable(machine: Machine) -> None:
    """Take it through what its state allows, to its deletion."""
    if machine.state in (State.CREATED, State.STOPPED, State.FAILED):
        machine.start()
    if machine.state is State.PAUSED:
        machine.resume()
    assert machine.exec(["echo", "here"]).text == "here\n"
    machine.pause()
    machine.resume()
    machine.stop()
    machine.delete()


@pytest.mark.parametrize("means", MEANS)
def test_create(home: TestHome, means: str) -> None:
    for _ in each_death(home, means, lambda vmm: vmm.create(IMAGE, name=NAME)):
        with home.open() as vmm:
            machines = vmm.list()
            assert_nothing_left(home.root, {machine.id for machine in machines})
            for machine in machines:
                assert (machine.state, machine.info()["operation"]) == (State.CREATED, "")
                usable(machine)
            machine = vmm.create(IMAGE, name=NAME)
            machine.delete()
            assert_nothing_left(home.root, set())
            assert vmm.images.get(IMAGE)


@pytest.mark.parametrize("means", MEANS)
def test_start(home: TestHome, means: str) -> None:
    with home.open() as vmm:
        machine_id = vmm.create(IMAGE, name=NAME).id
    for _ in each_death(home, means, lambda vmm: vmm.get(NAME).start()):
        with home.open() as vmm:
            machine = vmm.get(NAME)
            assert machine.id == machine_id
            assert machine.info()["operation"] == ""
            if machine.state is State.RUNNING:
                assert machine.exec(["true"]).exit_code == 0
                machine.stop()
            else:
                assert machine.state in (State.CREATED, State.STOPPED)
            assert_nothing_left(home.root, {machine_id})
            machine.start()
            machine.stop()
    with home.open() as vmm:
        usable(vmm.get(NAME))


@pytest.mark.parametrize("means", ["before-write", "after-write"])
@pytest.mark.parametrize("verb", ["pause", "resume", "stop", "delete"])
def test_other_verbs(home: TestHome, verb: str, means: str) -> None:
    def prepared(vmm: VMM) -> Machine:
        machine = vmm.create(IMAGE, name=NAME)
        machine.start()
        if verb == "resume":
            machine.pause()
        if verb == "delete":
            machine.stop()
        return machine

    with home.open() as vmm:
        prepared(vmm)
    for _ in each_death(home, means, lambda vmm: getattr(vmm.get(NAME), verb)()):
        with home.open() as vmm:
            try:
                machine = vmm.get(NAME)
            except NotFound:
                assert verb == "delete"
            else:
                assert machine.info()["operation"] == ""
                usable(machine)
            assert_nothing_left(home.root, set())
            prepared(vmm)


@pytest.mark.parametrize("means", MEANS)
def test_run(home: TestHome, means: str) -> None:
    """A machine of a dead process is gone with the next opening, wherever the process died."""

    def work(vmm: VMM) -> None:
        with vmm.run(IMAGE) as machine:
            machine.exec(["true"])

    for _ in each_death(home, means, work):
        with home.open() as vmm:
            assert vmm.list() == []
            assert_nothing_left(home.root, set())


def test_the_machine_of_a_dead_process_is_gone(home: TestHome) -> None:
    def work() -> None:
        vmm = home.open()
        vmm.create(IMAGE, lifetime="process")
        vmm.run(IMAGE)
        vmm.create(IMAGE, name="stays").start()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == KILLED
    with home.open() as vmm:
        (stays,) = vmm.list()
        assert (stays.name, stays.state) == ("stays", State.RUNNING)
        stays.delete(force=True)
    assert_nothing_left(home.root, set())


def test_folders_and_files_that_nobody_names(home: TestHome) -> None:
    (home.root / "machines" / "abcdef").mkdir()
    (home.root / "machines" / "abcdef" / "disk").write_text("x")
    (home.root / "machines" / "stray").write_text("x")
    (home.root / "machines" / "link").symlink_to("/")
    dead = Who(Who.me().pid, 1)
    (home.root / "tmp" / f"{dead.pid}-{dead.start}-half").mkdir()
    (home.root / "tmp" / f"{Who.me().pid}-{Who.me().start}-mine").write_text("x")
    with home.open() as vmm:
        assert [event.kind for event in vmm.events()][1:] == ["swept"] * 4
    assert list((home.root / "machines").iterdir()) == []
    (mine,) = (home.root / "tmp").iterdir()
    assert mine.name.endswith("-mine")


def test_a_live_operation_is_not_disturbed(home: TestHome) -> None:
    """While a child starts a machine slowly, others open the home, list and sweep."""
    with home.open() as vmm:
        machine = vmm.create(IMAGE)

        def start() -> None:
            with home.open(FakeEngine(delay=2)) as theirs:
                theirs.get(machine.name).start()

        pid = os.fork()
        if pid == 0:
            try:
                start()
            finally:
                os._exit(0)
        deadline = time.monotonic() + 10
        while machine.info()["operation"] != "start" and time.monotonic() < deadline:
            time.sleep(0.01)
        while machine.info()["operation"] == "start":
            with home.open() as other:
                assert other.sweep() == []
                assert [found.state for found in other.list()] in ([State.CREATED], [State.RUNNING])
        assert os.waitpid(pid, 0)[1] == 0
        assert machine.state is State.RUNNING
        assert machine.exec(["true"]).exit_code == 0


@pytest.mark.parametrize("gone", [False, True])
def test_an_operation_that_ended_in_the_meantime_was_not_cut_short(home: TestHome, running: Machine, gone: bool) -> None:
    """A sweep that read the record while it went on says nothing of what it came to."""
    context = running._context
    read = msgspec.structs.replace(context.row(running.id), state=State.CREATED, operation="start", operator=Who.me())
    if gone:
        running.delete(force=True)
    assert sweep._row(context, read, deep=False) == []


def test_what_has_begun_since_the_record_was_read_is_left_alone(home: TestHome, vmm: VMM, running: Machine) -> None:
    with locks.hold(home.folder(running) / "lock", "stop", running.name):
        assert vmm.sweep() == []
    assert running.state is State.RUNNING


def test_the_host_rebooted(home: TestHome, running: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(keeper_pid(home.folder(running)), signal.SIGKILL)
    _wait_gone(home, running)
    monkeypatch.setattr("trivisor.core.process.boot_id", lambda: "another boot")
    assert (running.state, running.info()["reason"]) == (State.FAILED, "the host rebooted")
    running.start()
    assert running.info()["boot_id"] == "another boot"


def _wait_gone(home: TestHome, machine: Machine) -> None:
    pid = int((home.folder(machine) / "keeper").read_text().split()[0])
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _wait_stat(pid: int, letter: str) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != letter and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_pause_that_nobody_wrote_down(home: TestHome, running: Machine) -> None:
    """The record says running, the engine is frozen: a deep sweep finds it, and so does a crashed verb."""
    engine = int((home.folder(running) / "engine").read_text().split()[0])
    os.kill(engine, signal.SIGSTOP)
    _wait_stat(engine, "T")
    with home.open() as vmm:
        assert vmm.get(running.name).state is State.RUNNING
        assert vmm.sweep() == [f"machine {running.name}: running is paused"]
        assert running.state is State.PAUSED
        running.resume()
        assert vmm.sweep() == []


def test_one_that_was_given_up_stands_still_though_its_engine_does_not_say_so(
    home: TestHome, vmm: VMM, running: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it went it may run: it is not taken to run here, because it was when its source died."""

    def silent(engine: FakeEngine, box: Box) -> bool:
        raise EngineError("QEMU does not answer")

    monkeypatch.setattr(FakeEngine, "paused", silent)
    for operation, state, reason in (("pause", State.RUNNING, ""), ("handover", State.PAUSED, reconcile.GIVEN_UP)):
        running._context.records.update(running.id, operation=operation, operator=Who(1, 1))
        assert (running.state, running.info()["reason"], running.info()["operation"]) == (state, reason, "")


def test_a_commit_that_was_killed(home: TestHome, running: Machine) -> None:
    """It stood still for that alone, so it runs on."""
    engine = int((home.folder(running) / "engine").read_text().split()[0])
    os.kill(engine, signal.SIGSTOP)
    _wait_stat(engine, "T")
    connection = sqlite3.connect(home.root / "trivisor.db")
    connection.execute("UPDATE machines SET operation = 'commit', operator = '1 1'")
    connection.commit()
    connection.close()
    with home.open() as vmm:
        assert vmm.get(running.name).state is State.RUNNING
        assert running.exec(["true"]).exit_code == 0


def test_a_folder_that_was_taken_away(home: TestHome, vmm: VMM, created: Machine) -> None:
    shutil.rmtree(home.folder(created))
    with pytest.raises(Exception, match="is gone") as caught:
        created.start()
    assert "delete" in caught.value.hint  # type: ignore[attr-defined]
    created.delete()
    assert vmm.list() == []
    assert_nothing_left(home.root, set())


def test_a_row_of_a_create_that_never_made_its_folder(home: TestHome) -> None:
    with home.open() as vmm:
        vmm.create(IMAGE, name=NAME).delete()
        machine = vmm.create(IMAGE, name=NAME)
    connection = sqlite3.connect(home.root / "trivisor.db")
    connection.execute("UPDATE machines SET operation = 'create', operator = '1 1'")
    connection.commit()
    connection.close()
    with home.open() as vmm:
        assert vmm.list() == []
        assert vmm.create(IMAGE, name=NAME).id != machine.id
