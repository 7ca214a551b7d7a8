"""The lock of a machine: one holder, named in the error, let go of however the holder ends."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from trivisor.core.errors import Busy, StorageError
from trivisor.vmm import locks

FORK = multiprocessing.get_context("fork")


def _hold(path: Path, pipe: Connection) -> None:
    with locks.hold(path, "start", "web"):
        pipe.send("held")
        pipe.recv()
    pipe.send("free")
    pipe.recv()


def _idle(pipe: Connection) -> None:
    pipe.send("here")
    pipe.recv()


def test_busy_names_the_operation_and_the_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine, theirs = FORK.Pipe()
    child = FORK.Process(target=_hold, args=(path, theirs))
    child.start()
    assert mine.recv() == "held"
    assert locks.held(path)
    with pytest.raises(Busy) as caught, locks.hold(path, "stop", "web"):
        pytest.fail("held twice")
    assert caught.value.operation == f"start by process {child.pid}"
    mine.send("let go")
    assert mine.recv() == "free"
    assert not locks.held(path)
    with locks.hold(path, "stop", "web"):
        pass
    mine.send("end")
    child.join()


def test_threads_and_reentry_are_refused_too(tmp_path: Path) -> None:
    with locks.hold(tmp_path / "lock", "start", "web"), pytest.raises(Busy), locks.hold(tmp_path / "lock", "stop", "web"):
        pytest.fail("held twice")


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine, theirs = FORK.Pipe()
    child = FORK.Process(target=_hold, args=(path, theirs))
    child.start()
    assert mine.recv() == "held"
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    with locks.hold(path, "stop", "web"):
        pass


def test_a_forked_child_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine, theirs = FORK.Pipe()
    with locks.hold(path, "start", "web"):
        child = FORK.Process(target=_idle, args=(theirs,))
        child.start()
        assert mine.recv() == "here"
        assert locks.held(path)
    assert not locks.held(path)
    mine.send("end")
    child.join()


def test_waiting_is_bounded(tmp_path: Path) -> None:
    began = time.monotonic()
    with locks.hold(tmp_path / "lock", "start", "web"), pytest.raises(Busy), locks.hold(tmp_path / "lock", "stop", "web", wait=0.2):
        pytest.fail("held twice")
    assert 0.2 <= time.monotonic() - began < 5


def test_a_machine_that_is_put_right_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine, theirs = FORK.Pipe()
    child = FORK.Process(target=_settle, args=(path, theirs))
    child.start()
    assert mine.recv() == "held"
    with locks.hold(path, "stop", "web"):
        pass
    child.join()


@pytest.mark.parametrize("left", ["", "start 999999999\n"], ids=["no name", "the name of one that was killed"])
def test_a_holder_that_says_its_name_late_is_waited_for(tmp_path: Path, left: str) -> None:
    path = tmp_path / "lock"
    path.write_text(left)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    late = threading.Timer(0.3, os.close, (fd,))
    late.start()
    with locks.hold(path, "stop", "web"):
        pass
    late.join()


def _settle(path: Path, pipe: Connection) -> None:
    with locks.hold(path, locks.SETTLE, "web"):
        pipe.send("held")
        time.sleep(0.3)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(locks.FolderGone), locks.hold(tmp_path / "no" / "lock", "start", "web"):
        pytest.fail("held nothing")
    assert not locks.held(tmp_path / "no" / "lock")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(locks.FolderGone), locks.hold(tmp_path / "lock", "start", "web", make=False):
        pytest.fail("held nothing")
    assert not (tmp_path / "lock").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError), locks.hold(tmp_path / "lock", "start", "web"):
        pytest.fail("followed")
    assert not (tmp_path / "elsewhere").exists()
