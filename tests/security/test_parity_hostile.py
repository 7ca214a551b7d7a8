"""A hostile tvinit, behind every wall: it answers with garbage, with frames that are too large, or never.

Calls end within their bounds and say whose fault it is; the keeper stays small and alive, the logs under their cap; the
machine can be stopped and deleted. The guest program is tvinit itself with a few functions replaced (hostile_guest.c).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import workers
from host_sentinel import KEEPER_MOST
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, EngineError, ExecTimeout, GuestError, HostError, InvalidState, Machine, State
from trivisor.core.spec import Wall
from trivisor.launch import tvinit

BOUND = 60.0
ROOT = Path(__file__).parents[2]
MODES = (
    "garbage", "endless garbage", "oversized", "half a frame", "too much data", "nobody's stream", "its own kind", "request",
    "short end", "wrong end", "endless log", "endless bye", "endless synced", "silence",
)  # fmt: skip
COMPILE = ["-I", ROOT / "guest/src", "-std=c11", "-D_GNU_SOURCE", "-O1"]
WRAPPED = ("line_open", "exec_frame", "line_synced")
FLOODS = ("endless garbage", "too much data", "endless log")
SOON = {"container": 0.3, "gvisor": 1.0, "vm": 1.0}
"""Seconds within which an honest guest would have answered."""
Install = Callable[[Path], None]


@pytest.fixture(scope="session")
def objects(shared_folder: Path) -> Path:
    """tvinit compiled, not linked: once for all workers."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = shared_folder / "tvinit-objects"
    with workers.once(shared_folder, "tvinit") as first:
        if first:
            folder.mkdir()
            subprocess.run(["gcc", *COMPILE, "-c", *(ROOT / "guest/src").glob("*.c")], check=True, cwd=folder)
    return folder


def build(objects: Path, *flags: str) -> Iterator[Path]:
    """Link the hostile functions over tvinit's own."""
    folder = Path(tempfile.mkdtemp(prefix="trivisor-hostile-"))
    folder.chmod(0o755)  # a jailed engine of another id runs it
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    hostile = Path(__file__).with_name("hostile_guest.c")
    subprocess.run(["gcc", *COMPILE, *flags, *wraps, "-static", "-o", folder / "tvinit", *objects.glob("*.o"), hostile], check=True)
    shutil.copy(tvinit.path().with_name("probe.bin"), folder)
    yield folder / "tvinit"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def liar(objects: Path) -> Iterator[Path]:
    yield from build(objects)


@pytest.fixture(scope="module")
def mute(objects: Path) -> Iterator[Path]:
    yield from build(objects, "-DSILENT")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Have machines started from now on run that tvinit."""

    def installed(program: Path) -> None:
        digest = hashlib.sha256(program.read_bytes()).hexdigest()
        monkeypatch.setattr(tvinit, "path", lambda: program)
        monkeypatch.setattr(tvinit, "digest", lambda: digest)
        monkeypatch.setenv("TRIVISOR_ICE", "off")

    return installed


def outcome(machine: Machine, mode: str) -> str:
    """An exec that cues the guest: it ends in time, with an error of the guest's or with what the guest says."""
    begun = time.monotonic()
    try:
        machine.exec([f"hostile {mode}"], timeout=SOON[machine.wall], max_output=1 << 20)
        return "answered"
    except (GuestError, InvalidState) as error:
        assert str(error)
        return type(error).__name__
    finally:
        assert time.monotonic() - begun < 30


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little of it: what was killed must have ended in half a second."""
    monkeypatch.setattr("trivisor.vos.capture.KILL_WAIT", 0.5)
    monkeypatch.setattr("trivisor.vos.command.KILL_WAIT", 0.5)


def some_lies(wall: Wall) -> Sequence[str]:
    """What listens to them is the same keeper and line behind each wall; a virtual machine takes seconds to boot."""
    return {"container": MODES, "gvisor": MODES[::3], "vm": FLOODS}[wall]


@pytest.mark.slow
@pytest.mark.usefixtures("patience")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chosen", [some_lies, pytest.param(lambda _: MODES, marks=pytest.mark.soak)], ids=["some", "all"])
def test_lies(wall_home: VmHome, wall: Wall, make: Make, liar: Path, install: Install, chosen: Callable[[Wall], Sequence[str]]) -> None:
    """Each lie in a life of its own of one machine, with an honest machine beside it."""
    honest = make(name="honest")
    install(liar)
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall, name="liar")
        try:
            for mode in chosen(wall):
                lie(machine, mode, honest)
        finally:
            machine.delete(force=True)


def lie(machine: Machine, mode: str, honest: Machine) -> None:
    machine.start()
    assert machine.exec(["echo", "honest"], timeout=BOUND).text == "honest\n"
    folder = Path(machine.info()["folder"])
    keeper = int((folder / "keeper").read_text().split()[0])
    said = outcome(machine, mode)
    assert said != "answered" or mode in ("wrong end", "short end"), mode
    if machine.state is State.RUNNING:
        with suppress(FileNotFoundError, ProcessLookupError):  # it may end, this moment
            status = Path(f"/proc/{keeper}/status").read_text()
            resident = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
            assert max(resident, default=0) < KEEPER_MOST, f"the keeper has {resident} KiB after {mode!r}"
        with suppress(GuestError, HostError, InvalidState):
            machine.stats(timeout=SOON[machine.wall])
    assert sum(path.stat().st_size for path in (folder / "logs").iterdir()) < 32 << 20, mode
    assert honest.exec(["echo", "here"], timeout=BOUND).text == "here\n"
    begun = time.monotonic()
    if machine.state is State.RUNNING:
        with suppress(InvalidState):
            machine.stop(timeout=SOON[machine.wall])
    assert time.monotonic() - begun < 40, mode
    assert machine.state in (State.STOPPED, State.FAILED)


@pytest.mark.walls("container", "gvisor")
def test_one_that_never_answers(wall_home: VmHome, wall: Wall, mute: Path, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start gives up when its time is over, and leaves nothing; as with vm, whose time is longer."""
    install(mute)
    monkeypatch.setattr(f"trivisor.vmm.engines.{wall}.engine._WAIT", 2.0)
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall=wall)
        begun = time.monotonic()
        with pytest.raises((EngineError, GuestError)) as caught:
            machine.start()
        assert time.monotonic() - begun < 20
        assert not isinstance(caught.value, ExecTimeout)
        assert machine.state is State.CREATED
        machine.delete()
