"""Root in a guest that does to its end of the line what it can: the host's calls end within their bounds, the keeper lives,
and the machine can be stopped, started again and deleted."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from host_sentinel import KEEPER_MOST
from wall_fixtures import Make

from trivisor import ExecTimeout, GuestError, GuestGone, GuestProtocolError, Machine, State
from trivisor.core.paths import MachineDir
from trivisor.vmm.engines.vm import proc

BOUND = 60.0
REFUSALS = (GuestGone, GuestProtocolError, ExecTimeout)


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    program = tmp_path_factory.mktemp("hostile") / "port_writer"
    source = Path(__file__).with_name("port_writer.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source], check=True)
    return program


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little of it: what was killed must have ended in half a second, so that tests of what does not end are short."""
    monkeypatch.setattr("trivisor.vos.capture.KILL_WAIT", 0.5)
    monkeypatch.setattr("trivisor.vos.command.KILL_WAIT", 0.5)


def attempt(machine: Machine) -> str:
    """An exec: it works, or says what is wrong with the guest, and either within its timeout and a little."""
    began = time.monotonic()
    try:
        said = machine.exec(["echo", "here"], timeout=1).text
        assert said == "here\n"
        return "works"
    except REFUSALS as error:
        assert error.machine == machine.name
        return type(error).__name__
    finally:
        assert time.monotonic() - began < BOUND


def keeper(machine: Machine) -> int:
    pid = proc.keeper_pid(MachineDir(Path(machine.info()["folder"])))
    assert pid is not None
    return pid


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    ("mode", "size"),
    [
        *[("random", 0), ("frames", 20_000), ("header", 12), ("steal", 0)],
        *[pytest.param(*case, marks=pytest.mark.soak) for case in (("random", 200_000), ("frames", 0), ("header", 0))],
    ],
)
def test_the_line_is_written_to_by_another(make: Make, writer: Path, mode: str, size: int) -> None:
    machine = make()
    pid = keeper(machine)
    machine.files.upload(writer, "/root/writer")
    machine.exec("echo kept >/root/file; sync", check=True)
    with contextlib.suppress(*REFUSALS):  # it may be quicker than the answer that it has begun
        machine.spawn(["/root/writer", str(size), mode], detach=True)
    deadline = time.monotonic() + BOUND
    if size == 0 and mode != "steal":
        while attempt(machine) == "works":  # it has not begun yet
            assert time.monotonic() < deadline
        outcomes = [attempt(machine) for _ in range(2)]
        assert "works" not in outcomes, outcomes
    else:
        for _ in range(6 if size else 3):
            attempt(machine)
    if size > 12:
        # When it is over, host and guest find each other again.
        while attempt(machine) != "works":
            assert time.monotonic() < deadline
        assert machine.exec("echo again", timeout=BOUND).text == "again\n"
    assert machine.state is State.RUNNING
    assert keeper(machine) == pid
    memory = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[0]
    assert int(memory.split("Rss:")[1].split()[0]) < KEEPER_MOST, "KiB"
    machine.pause()
    machine.resume()
    machine.stop(timeout=2)
    assert machine.state is State.STOPPED
    machine.start()
    assert machine.files.read_text("/root/file") == "kept\n"


def test_a_fork_bomb(make: Make) -> None:
    """The guest is full of processes; the host can still stop it."""
    machine = make()
    machine.spawn("bomb() { bomb | bomb & }; bomb", detach=True)
    for _ in range(3):
        try:
            machine.exec(["true"], timeout=2)
        except GuestError:
            continue
    machine.stop(timeout=15)
    assert machine.state is State.STOPPED
    machine.start()
    assert machine.exec(["echo", "here"]).text == "here\n"


def test_a_guest_that_fills_its_own_disk(make: Make) -> None:
    """It takes no more of the host than its spec says."""
    machine = make(disk="32M")
    machine.exec("cat /dev/zero >/root/full; tr '\\0' x </dev/zero >/root/more", timeout=BOUND)
    disk = MachineDir(Path(machine.info()["folder"])).disk
    assert disk.stat().st_blocks * 512 < 40 << 20
    assert machine.exec(["echo", "here"]).text == "here\n"
    machine.stop()
    machine.start()
    machine.exec("rm /root/full /root/more", check=True)
