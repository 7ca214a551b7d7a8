"""kill -9 at every step of snapshot, restore, fork, suspend, resume and a create from a snapshot; a disk that is full in the middle.

Children die one step later each time: at each thing that could be taken back, before and after each transaction of the records. Then
the parent lives or can be brought back, nothing half is listed, and nothing is left on the disk.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from frozen_engine import FreezingEngine, disk, mind, think, write
from host_state import assert_nothing_left, processes
from machine_home import IMAGE, KILLED, TestHome, die_at_undo, in_child

from trivisor import VMM, Machine, State, StorageError
from trivisor.vmm.records import Records
from trivisor.vmm.snapshots import packing, pieces

MOST = 60


def die_at_transaction(number: int, *, after: bool) -> None:
    left = number
    writing = Records._writing  # the one place where all that is written down is

    @contextmanager
    def counted(self: Records, **how: bool) -> Iterator[object]:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        with writing(self, **how) as connection:
            yield connection
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Records._writing = counted  # type: ignore[method-assign,assignment]


MEANS: dict[str, Callable[[int], None]] = {
    "undo": die_at_undo,
    "before": lambda number: die_at_transaction(number, after=False),
    "after": lambda number: die_at_transaction(number, after=True),
}
VERBS: dict[str, Callable[[VMM], object]] = {
    "snapshot": lambda vmm: vmm.get("web").snapshot("new"),
    "restore": lambda vmm: vmm.get("web").restore("ready"),
    "restore-files": lambda vmm: vmm.get("web").restore("files"),
    "fork": lambda vmm: vmm.get("web").fork(2),
    "suspend": lambda vmm: vmm.get("web").suspend(),
    "resume": lambda vmm: vmm.get("web").resume(),
    "create": lambda vmm: vmm.create(snapshot="web@ready", name="kid").start(),
    "remove": lambda vmm: vmm.snapshots.remove("web@ready"),
}


def opened(home: TestHome) -> VMM:
    return home.open(FreezingEngine())


def prepare(home: TestHome, verb: str) -> None:
    with opened(home) as vmm:
        web = vmm.create(IMAGE, name="web")
        web.start()
        think(home.folder(web), b"warm")
        write(home.folder(web), b"files" * 1000)
        web.snapshot("ready")
        web.snapshot("files", memory=False)
        if verb == "resume":
            web.suspend()


def settled(home: TestHome, vmm: VMM) -> None:
    """What must be so wherever the child died."""
    for machine in vmm.list():
        assert machine.info()["operation"] == ""
    places = {entry.name for entry in (home.root / "snapshots").iterdir()} - {"packs"}
    named = {one.id for one in vmm.snapshots.list()} | {
        word for machine in vmm.list() for word in (*machine.info()["base"].split(), machine.info()["ice"]) if word
    }
    assert places == named
    assert vmm.snapshots.check() == []
    assert list((home.root / "tmp").iterdir()) == []


def alive(home: TestHome, vmm: VMM, verb: str) -> Machine:
    """The parent runs as it did, or does after what its state calls for."""
    web = vmm.get("web")
    if web.state is State.SUSPENDED:
        web.resume()
    elif web.state is State.FAILED:
        assert verb.startswith("restore")
        web.restore("ready")
    assert web.state is State.RUNNING
    if verb != "restore-files":
        assert mind(home.folder(web)) == b"warm"
    assert disk(home.folder(web)) == b"files" * 1000
    assert web.exec(["echo", "here"]).text == "here\n"
    return web


# Before one transaction is after the one before it, but for what was not written down between them.
STEPS = [
    pytest.param(verb, means, marks=[pytest.mark.soak] if means == "before" else [])
    for verb in VERBS
    for means in MEANS
    if means != "undo" or verb not in ("suspend", "remove")
]


@pytest.mark.parametrize(("verb", "means"), STEPS)
def test_killed_at_each_step(home: TestHome, verb: str, means: str) -> None:
    prepare(home, verb)
    for number in range(1, MOST):

        def child(number: int = number) -> None:
            with opened(home) as vmm:
                MEANS[means](number)
                VERBS[verb](vmm)

        status = in_child(child)
        assert status in (0, KILLED)
        with opened(home) as vmm:
            settled(home, vmm)
            web = alive(home, vmm, verb)
            left = {machine.name for machine in vmm.list()} - {"web"}
            assert not left or verb in ("fork", "create")
            for name in left:
                vmm.get(name).delete(force=True)
            for one in vmm.snapshots.list():
                if one.name == "new":
                    vmm.snapshots.remove(one.ref)
            if not [one for one in vmm.snapshots.list() if one.name == "ready"]:
                web.snapshot("ready")
            if verb == "resume":
                web.suspend()
            settled(home, vmm)
        if status == 0:
            assert number > 1, "no step was ever counted"
            break
    else:
        pytest.fail(f"over {MOST} steps")
    with opened(home) as vmm:
        vmm.get("web").delete(force=True)
        vmm.snapshots.prune(everything=True)
        assert_nothing_left(home.root, set())
        assert {entry.name for entry in (home.root / "snapshots").iterdir()} <= {"packs"}
        assert [*(home.root / "snapshots/packs/blobs/sha256").iterdir()] == []


def files(home: TestHome) -> set[str]:
    return {str(path) for path in (home.root / "snapshots").rglob("*") if path.is_file() and "index.db" not in path.name}


def test_a_full_disk(home: TestHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the snapshot, wherever it is met, and nothing else."""
    prepare(home, "snapshot")
    before = files(home)
    with opened(home) as vmm:
        web = vmm.get("web")

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for place, name in ((pieces.Writer, "close"), (pieces.Writer, "add"), (Path, "mkdir"), (packing, "encode")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, full)
                with pytest.raises(StorageError, match="No space left"):
                    write(home.folder(web), os.urandom(8192)) if place is pieces.Writer else None
                    web.snapshot("more")
            assert [one.name for one in vmm.snapshots.list()] == ["ready", "files"]
            assert web.exec(["true"]).exit_code == 0
            assert files(home) == before
        web.snapshot("more")
        web.delete(force=True)
    assert not processes(home.root)


@pytest.mark.parametrize("number", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_forks_come_and_go(home: TestHome, number: int) -> None:
    """Forks of forks, deleted in every order: what they lie in goes with the last."""
    prepare(home, "fork")
    descriptors = len(os.listdir("/proc/self/fd"))
    with opened(home) as vmm:
        line = [vmm.get("web")]
        for turn in range(number):
            (child,) = line[turn % len(line)].fork(names=[f"fork-{turn}"])
            line.append(child)
            if len(line) > 4:
                line.pop(1 + turn % 3).delete(force=True)
        assert all(mind(home.folder(machine)) == b"warm" for machine in line)
        settled(home, vmm)
        for machine in line:
            machine.delete(force=True)
        vmm.snapshots.prune(everything=True)
        assert_nothing_left(home.root, set())
        assert {entry.name for entry in (home.root / "snapshots").iterdir()} <= {"packs"}
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
