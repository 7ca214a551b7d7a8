"""Many at once: processes on one machine, forked children, several homes; and homes that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from host_state import assert_nothing_left
from machine_home import IMAGE, KILLED, TestHome, in_child

from trivisor import VMM, AlreadyExists, Busy, InvalidState, Machine, NotFound, State, StorageError, TrivisorError

FORK = multiprocessing.get_context("fork")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_two_processes_drive_one_machine(home: TestHome) -> None:
    """Every verb of everybody either works or says why not, and the machine is usable at the end."""
    with home.open() as vmm:
        machine = vmm.create(IMAGE)

    def drive(seed: int) -> None:
        with home.open() as mine:
            shared = mine.get(machine.name)
            for turn in range(25):
                verb = (shared.start, shared.pause, shared.resume, shared.stop, lambda: shared.exec(["true"]))[(seed * 7 + turn * 3) % 5]
                try:
                    verb()
                except (InvalidState, Busy):
                    continue
                except TrivisorError as error:
                    # A command may lose its machine to the other's stop.
                    assert type(error).__name__ == "GuestGone", repr(error)

    statuses = []
    threads = [threading.Thread(target=lambda seed=seed: statuses.append(in_child(lambda: drive(seed)))) for seed in (1, 2)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0]
    with home.open() as vmm:
        shared = vmm.get(machine.name)
        assert shared.info()["operation"] == ""
        if shared.state is State.PAUSED:
            shared.resume()
        if shared.state is not State.RUNNING:
            shared.start()
        assert shared.exec(["true"]).exit_code == 0


def test_one_of_many_starts_it(home: TestHome, created: Machine) -> None:
    outcomes: list[str] = []

    def start() -> None:
        try:
            with home.open() as mine:
                mine.get(created.name).start()
            outcomes.append("started")
        except (Busy, InvalidState) as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("started") == 1
    assert len(outcomes) == 6
    assert created.state is State.RUNNING


def test_many_create_with_one_name(home: TestHome, vmm: VMM) -> None:
    outcomes: list[str] = []

    def create() -> None:
        try:
            vmm.create(IMAGE, name="web")
            outcomes.append("made")
        except AlreadyExists:
            outcomes.append("taken")

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] + ["taken"] * 7
    assert_nothing_left(home.root, {vmm.get("web").id})


def _use_after_parent(machine: Machine, pipe: Connection) -> None:
    os.setsid()
    pipe.recv()  # the parent is dead
    pipe.send((machine.state.value, machine.exec(["echo", "still"]).text))
    machine.stop()
    machine.delete()
    pipe.send("deleted")


def test_a_child_uses_a_machine_whose_parent_dies(home: TestHome) -> None:
    mine, theirs = FORK.Pipe()

    def parent() -> None:
        vmm = home.open()
        machine = vmm.create(IMAGE)
        machine.start()
        assert machine.exec(["true"]).exit_code == 0  # so that the parent has a line of its own
        FORK.Process(target=_use_after_parent, args=(machine, theirs)).start()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == KILLED
    mine.send("go on")
    assert mine.poll(30)
    assert mine.recv() == ("running", "still\n")
    assert mine.poll(30)
    assert mine.recv() == "deleted"
    assert_nothing_left(home.root, set())


def _watch_it_go(machine: Machine, pipe: Connection) -> None:
    os.setsid()
    pipe.recv()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            machine.exec(["true"])
        except NotFound:
            pipe.send("gone")
            return
        except TrivisorError:
            continue
    pipe.send("still there")


def test_a_child_loses_the_machine_of_its_parents_life(home: TestHome) -> None:
    mine, theirs = FORK.Pipe()

    def parent() -> None:
        machine = home.open().run(IMAGE)
        FORK.Process(target=_watch_it_go, args=(machine, theirs)).start()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == KILLED
    mine.send("go on")
    assert mine.poll(30)
    assert mine.recv() == "gone"
    assert_nothing_left(home.root, set())


def _exec_often(machine: Machine) -> None:
    for turn in range(5):
        assert machine.exec(["echo", str(turn)]).text == f"{turn}\n"


def test_parent_and_children_use_it_at_once(running: Machine) -> None:
    assert running.exec(["true"]).exit_code == 0
    children = [FORK.Process(target=_exec_often, args=(running,)) for _ in range(4)]
    for child in children:
        child.start()
    _exec_often(running)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert running.exec(["true"]).exit_code == 0


def test_spawned_processes_open_their_own(home: TestHome, running: Machine) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from fake_engine import FakeEngine; from trivisor import VMM\n"
        "print(VMM(sys.argv[1], engines=[FakeEngine()]).get(sys.argv[2]).exec('echo other').text, end='')"
    )
    tests = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, home.root, running.id, tests], capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"other\n", b"")


def test_two_homes_at_once(tmp_path: Path, home_template: Path) -> None:
    homes = [TestHome(tmp_path / name, home_template) for name in "ab"]
    machines = []
    for home in homes:
        machine = home.open().create(IMAGE, name="web")
        machine.start()
        machines.append(machine)
    assert machines[0].id != machines[1].id
    machines[0].delete(force=True)
    assert machines[1].exec(["true"]).exit_code == 0
    machines[1].delete(force=True)
    for home in homes:
        assert_nothing_left(home.root, set())


def test_a_home_with_a_long_path(tmp_path: Path, home_template: Path) -> None:
    """sun_path of unix(7) holds 108 bytes; folders are longer."""
    home = TestHome(tmp_path / ("x" * 120) / "home", home_template)
    with home.open() as vmm, vmm.run(IMAGE) as machine:
        assert machine.exec(["true"]).exit_code == 0
    assert_nothing_left(home.root, set())


@needs_root
def test_the_home_of_another_user(home: TestHome) -> None:
    os.chown(home.root, 12345, 12345)
    with pytest.raises(StorageError, match="belongs to user 12345") as caught:
        home.open()
    assert caught.value.hint
    os.chown(home.root, 0, 0)


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    with pytest.raises(StorageError):
        VMM(tmp_path / "home")


@needs_root
def test_a_read_only_home(home: TestHome, created: Machine) -> None:
    def work() -> None:
        home_path = str(home.root)
        subprocess.run(["mount", "--bind", home_path, home_path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", home_path], check=True)
        with pytest.raises(StorageError, match="read-only") as caught:
            home.open()
        assert caught.value.hint
        with pytest.raises(StorageError):
            created.start()

    assert in_own_mounts(work) == 0
    created.start()
    assert created.exec(["true"]).exit_code == 0


@needs_root
@pytest.mark.parametrize("step", ["create", "start"])
def test_a_full_disk(tmp_path: Path, home_template: Path, step: str) -> None:
    """Each verb on a full disk works or is a StorageError; a delete works and makes room; nothing is lost."""

    def work() -> None:
        place = tmp_path / "small"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=True)
        home = TestHome(place / "home", home_template)
        with home.open() as vmm:
            keeps = vmm.create(IMAGE, name="keeps")
            keeps.start()
            other = vmm.create(IMAGE, name="other")
            fill(home.folder(keeps) / "ballast")
            if step == "create":
                with pytest.raises((StorageError, OSError)) as caught:
                    vmm.create(IMAGE, name="third")
            else:
                with pytest.raises(TrivisorError) as caught:
                    other.start()
                assert other.state is State.CREATED
            assert isinstance(caught.value, TrivisorError)
            assert keeps.exec(["echo", "unharmed"]).text == "unharmed\n"
            assert {machine.name for machine in vmm.list()} == {"keeps", "other"}
            keeps.delete(force=True)
            other.start()
            assert other.exec(["true"]).exit_code == 0
            vmm.create(IMAGE, name="third").delete()
            other.delete(force=True)
        assert_nothing_left(home.root, set())

    assert in_own_mounts(work) == 0


def fill(path: Path) -> None:
    """Take every byte that the file system has left."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\xff" * size)
            except OSError:
                continue


def in_own_mounts(work: object) -> int:
    """Run `work` in a child with a mount namespace of its own, which ends with it."""
    import ctypes

    def child() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        newns = 0x20000
        assert libc.unshare(newns) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        work()  # type: ignore[operator]

    return in_child(child)
