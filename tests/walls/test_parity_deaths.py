"""Whoever dies, with kill -9 and at any moment: what is left can be said, used and cleared away."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from machine_home import KILLED, VmHome, in_child
from wall_fixtures import Make

from trivisor import VMM, Busy, EngineError, ExecTimeout, GuestGone, InvalidState, Machine, NotFound, State
from trivisor.core.paths import MachineDir
from trivisor.core.spec import Wall
from trivisor.vmm.engines.vm import proc
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vmm.procs import tree
from trivisor.vos.line import Line

BOUND = 60.0


def place(machine: Machine) -> MachineDir:
    return MachineDir(Path(machine.info()["folder"]))


def engine(machine: Machine) -> int:
    """The process that the keeper keeps, as it says itself."""
    line = Line.connect(place(machine).line, machine.name)
    try:
        return int(line.keeper_info()["engine"])
    finally:
        line.close()


def sentry(machine: Machine) -> int:
    """What the guest's programs run on: with gVisor a child of what the keeper keeps."""
    if machine.wall != "gvisor":
        return engine(machine)
    deadline = time.monotonic() + BOUND
    while True:  # the list of a process's children may miss some while one of them ends (proc(5))
        for pid in tree(place(machine)):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"runsc-sandbox"):
                    return int(pid)
        assert time.monotonic() < deadline


def keeper(machine: Machine) -> int:
    pid = proc.keeper_pid(place(machine))
    assert pid is not None
    return pid


def ends(pid: int) -> None:
    """Wait until the process is gone, or a zombie that only its new parent can take away: it holds no lock any more then."""
    deadline = time.monotonic() + BOUND
    with suppress(OSError):  # it is gone
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            assert time.monotonic() < deadline
            time.sleep(0.01)


def under_way(machine: Machine) -> tuple[threading.Thread, list[BaseException]]:
    """A long exec in another thread, and what it raises."""
    raised: list[BaseException] = []
    begun = threading.Event()

    def work() -> None:
        try:
            machine.exec("echo begun; sleep 1000", on_stdout=lambda _: begun.set())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(BOUND)
    return thread, raised


@pytest.mark.parametrize(
    ("victim", "reason"), [(engine, "its engine was killed by signal 9"), (keeper, "its keeper was killed")], ids=["engine", "keeper"]
)
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_killed(make: Make, victim: Callable[[Machine], int], reason: str, paused: bool) -> None:
    machine = make()
    machine.exec("echo kept >/root/file; sync", check=True)
    thread, raised = under_way(machine)
    pids = [engine(machine), keeper(machine)]
    if paused:
        machine.pause()
    os.kill(victim(machine), signal.SIGKILL)
    machine.wait(BOUND)
    assert (machine.state, machine.info()["reason"]) == (State.FAILED, reason)
    thread.join(BOUND)
    assert [type(error) for error in raised] == [GuestGone]
    for pid in pids:
        ends(pid)
    for call in (lambda: machine.exec(["true"]), machine.pause, machine.resume, machine.stop):
        with pytest.raises(InvalidState):
            call()
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"
    assert machine.info()["reason"] == ""


def killed_while_starting(machine: Machine, find: Callable[[], int | None]) -> BaseException | None:
    """Kill the process that `find` returns, as soon as it does, while the machine starts; return what the start raised."""
    raised: list[BaseException] = []

    def start() -> None:
        try:
            machine.start()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    deadline = time.monotonic() + BOUND
    while True:
        starting = thread.is_alive()  # before the look: what has started stays to be found
        with suppress(ProcessLookupError):  # one that ended meanwhile
            if (pid := find()) is not None:
                os.kill(pid, signal.SIGKILL)
                break
        assert starting and time.monotonic() < deadline, raised
    thread.join(BOUND)
    assert not thread.is_alive()
    ends(pid)
    return raised[0] if raised else None


def child_of_keeper(folder: MachineDir) -> int | None:
    pid = proc.keeper_pid(folder)
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return next((int(child) for child in children.read_text().split()), None)
    except OSError:
        return None


@pytest.mark.parametrize("whom", ["engine", "keeper"])
def test_killed_while_starting(wall_vmm: VMM, wall: Wall, whom: str) -> None:
    for _ in range(20):
        machine = wall_vmm.create("debian", wall=wall)
        folder = place(machine)
        find = partial(child_of_keeper if whom == "engine" else proc.keeper_pid, folder)
        error = killed_while_starting(machine, find)
        if error is not None:
            break
        machine.delete(force=True)  # it had started by then: a container takes milliseconds
    # GuestGone where it died after its first answer.
    assert isinstance(error, EngineError | GuestGone), error
    assert error.machine == machine.name or machine.name in str(error) or machine.id in str(error)
    assert machine.state is State.CREATED
    assert machine.info()["operation"] == ""
    assert not list(folder.root.glob("*.sock"))
    machine.start()
    assert machine.exec(["echo", "here"]).text == "here\n"


def test_qemu_killed_while_it_makes_ice(own_home: VmHome) -> None:
    with VMM(own_home.root) as vmm:
        machine = vmm.create("debian", wall="vm", memory="144M", disk="ram")

        def find() -> int | None:
            places = own_home.root.glob("tmp/*-ice-*/machine")
            return next((pid for folder in places if (pid := child_of_keeper(MachineDir(folder))) is not None), None)

        error = killed_while_starting(machine, find)
        assert isinstance(error, EngineError | GuestGone), error
        assert list((own_home.root / "tmp").iterdir()) == []
        assert machine.state is State.CREATED
        machine.start()
        assert machine.exec(["echo", "here"]).text == "here\n"


def test_its_keeper_takes_the_machine_down_when_its_owner_dies(wall_home: VmHome, wall: Wall, tmp_path: Path) -> None:
    """Before anybody opens the home again."""
    said = tmp_path / "said"

    def work() -> None:
        machine = VMM(wall_home.root).run("debian", wall=wall)
        said.write_text(f"{engine(machine)} {keeper(machine)} {machine.id}")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == KILLED
    engine_pid, keeper_pid, machine_id = said.read_text().split()
    ends(int(engine_pid))
    ends(int(keeper_pid))
    with VMM(wall_home.root) as vmm, pytest.raises(NotFound):
        vmm.get(machine_id)


def test_a_persistent_machine_outlives_its_process(wall_home: VmHome, wall: Wall) -> None:
    def work() -> None:
        VMM(wall_home.root).create("debian", wall=wall, name="heir").start()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == KILLED
    with VMM(wall_home.root) as vmm:
        machine = vmm.get("heir")
        assert machine.exec(["echo", "here"]).text == "here\n"
        machine.delete(force=True)


def test_a_forked_child_goes_on_when_its_parent_dies(wall_home: VmHome, wall: Wall, tmp_path: Path) -> None:
    """multiprocessing: the parent made the machine and has its line open; the child uses it after the parent's death."""
    said = tmp_path / "said"

    def child(machine: Machine, parent: int) -> None:
        os.setsid()
        assert machine.exec(["echo", "both"]).text == "both\n"
        os.kill(parent, signal.SIGKILL)
        for _ in range(3):
            assert machine.exec(["echo", "alone"]).text == "alone\n"
        machine.stop()
        machine.delete()
        said.write_text("done")

    def parent() -> None:
        with VMM(wall_home.root) as vmm:
            machine = vmm.create("debian", wall=wall, name="inherited")
            machine.start()
            assert machine.exec(["true"]).ok
            process = multiprocessing.get_context("fork").Process(target=child, args=(machine, os.getpid()))
            process.start()
            process.join(BOUND)

    assert in_child(parent) == KILLED
    deadline = time.monotonic() + BOUND
    while not said.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_drive_one_machine(wall_home: VmHome, make: Make) -> None:
    """They pause and resume it as they like: each call works or says who is at it; then it is as the last of them left it."""
    machine = make()

    def work() -> None:
        with VMM(wall_home.root) as vmm:
            mine = vmm.get(machine.id)
            for _ in range(30):
                for call in (mine.pause, mine.resume, lambda: mine.exec(["true"], timeout=BOUND)):
                    try:
                        call()
                    except (Busy, InvalidState, ExecTimeout):
                        continue

    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(in_child(work))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert statuses == [0, 0]
    if machine.state is State.PAUSED:
        machine.resume()
    assert machine.exec(["echo", "here"]).text == "here\n"


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set bounds of a second, so that tests of what hangs do not wait for the real ones. For what hangs alone: a busy host needs longer."""
    monkeypatch.setattr("trivisor.vos.capture.KILL_WAIT", 1.0)
    monkeypatch.setattr(Qmp.connect.__func__, "__defaults__", ("", 1.0))  # type: ignore[attr-defined]


def test_an_engine_that_hangs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by SIGSTOP: every call comes back within its bound, and the machine can be stopped and used again."""
    machine = make()
    machine.exec("echo kept >/root/file; sync", check=True)
    os.kill(sentry(machine), signal.SIGSTOP)
    impatient(monkeypatch)
    with pytest.raises(ExecTimeout):
        machine.exec(["true"], timeout=1)
    if machine.wall == "vm":  # another engine is not asked: its machine is frozen from outside
        with pytest.raises(EngineError) as caught:
            machine.pause()
        assert caught.value.machine == machine.name
    assert machine.state is State.RUNNING
    machine.stop(timeout=1)
    assert machine.state is State.STOPPED
    monkeypatch.undo()
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"


@pytest.mark.walls("container")
def test_a_keeper_that_hangs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make()
    os.kill(keeper(machine), signal.SIGSTOP)
    impatient(monkeypatch)
    monkeypatch.setattr("trivisor.vmm.life._KEEPER_LATE", 1.0)
    with pytest.raises((ExecTimeout, GuestGone)):
        machine.exec(["true"], timeout=1)
    machine.stop(timeout=0.5)
    assert machine.state in (State.STOPPED, State.FAILED)
    monkeypatch.undo()
    machine.start()
    assert machine.exec(["echo", "here"]).text == "here\n"


def test_the_host_rebooted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: no process is there any more, and the boot id is another."""
    machine = make()
    machine.exec("echo kept >/root/file; sync", check=True)
    pid = engine(machine)
    os.kill(keeper(machine), signal.SIGKILL)
    ends(pid)
    monkeypatch.setattr("trivisor.core.process.boot_id", lambda: "another boot")
    assert (machine.state, machine.info()["reason"]) == (State.FAILED, "the host rebooted")
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"


def interrupted(home: Path, name: str, record: Path) -> int:
    """Press Ctrl-C at a process that starts a machine, when `record` is there: 7 if that came out of the start, 0 if that was over."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with VMM(home) as mine:
            mine.get(name).start()
            os._exit(0)

    pid = os.fork()
    if pid == 0:
        try:
            work()
        except KeyboardInterrupt:
            os._exit(7)
        finally:
            os._exit(1)
    deadline = time.monotonic() + BOUND
    while not record.exists():
        assert time.monotonic() < deadline
    os.kill(pid, signal.SIGINT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_interrupted_while_starting(wall_home: VmHome, wall: Wall) -> None:
    """Ctrl-C takes a start back, whenever it comes before its last step; the machine can be started after it."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, name="interrupted")
        folder = place(machine)
        for wait in ("keeper", "engine") if wall == "vm" else ("keeper",):
            for _ in range(20):
                (folder.root / wait).unlink(missing_ok=True)
                before = machine.state
                status = interrupted(wall_home.root, "interrupted", folder.root / wait)
                if machine.state is not State.RUNNING:
                    break
                machine.stop(timeout=0)  # its record, the last step, was written by then: a container takes milliseconds
            assert (status, machine.state) == (7, before)
            if (left := proc.keeper_pid(folder)) is not None:
                ends(left)
        machine.start()
        assert machine.exec(["echo", "here"]).text == "here\n"
        machine.delete(force=True)
