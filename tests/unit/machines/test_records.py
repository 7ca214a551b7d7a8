"""The records: what is written survives, names and slots are unique, failures are StorageErrors, forks are safe."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trivisor.core.errors import AlreadyExists, StorageError
from trivisor.core.process import Who
from trivisor.core.spec import Spec
from trivisor.core.state import State
from trivisor.vmm import records as module
from trivisor.vmm.records import Records, Row

FORK = multiprocessing.get_context("fork")


def row(name: str, **more: Any) -> Row:
    spec = Spec(image="debian", name=name, wall="vm", ports={8080: 80}, env={"A": "é"})
    return Row(
        **{"id": f"id-{name}", "name": name, "slot": 0, "spec": spec, "digest": "sha256:0", "state": State.CREATED, "created": 1.5, **more}
    )


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "db")


def test_what_is_written_is_read(records: Records) -> None:
    me = Who.me()
    added = records.add(row("web", operation="create", operator=me, owner=me, facts={"pid": "1"}, status=3, ended=2.5))
    assert records.row("id-web") == added
    assert records.rows() == [added]
    assert (added.slot, added.operator, added.facts) == (1, me, {"pid": "1"})
    changed = records.update("id-web", state=State.RUNNING, operation="", operator=None, facts={"a": "b"}, event=("started", "at last"))
    assert changed == msgspec.structs.replace(added, state=State.RUNNING, operation="", operator=None, facts={"a": "b"})
    assert Records(records.path).row("id-web") == changed
    records.remove(added, ("deleted", ""))
    records.remove(added, ("deleted", ""))
    assert records.rows() == []
    assert records.update("id-web", state=State.FAILED, event=("failed", "")) is None
    assert [(event.kind, event.name, event.detail) for event in records.events()] == [("started", "web", "at last"), ("deleted", "web", "")]


def test_slots_are_the_smallest_free(records: Records) -> None:
    for name in "abc":
        records.add(row(name))
    records.remove(row("b"))
    assert records.add(row("d")).slot == 2
    assert records.add(row("e")).slot == 4


def test_a_name_is_unique(records: Records) -> None:
    records.add(row("web"))
    with pytest.raises(AlreadyExists):
        records.add(row("web", id="other"))
    assert len(records.rows()) == 1


def test_finding(records: Records) -> None:
    records.add(row("web", id="abc1"))
    records.add(row("abc2", id="ffff"))
    records.add(row("db", id="abc2"))
    assert [found.id for found in records.find("abc2")] == ["abc2"]  # an id before a name
    assert [found.id for found in records.find("web")] == ["abc1"]
    assert [found.id for found in records.find("abc")] == ["abc1", "abc2"]
    assert records.find("%") == records.find("_") == records.find("") == []


def test_events_are_bounded(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_EVENTS", 50)
    for number in range(230):
        records.note("swept", str(number))
    kept = records.events()
    assert len(kept) <= 150
    assert kept[-1].detail == "229"
    assert [event.id for event in kept] == sorted(event.id for event in kept)
    assert records.events(since=kept[-2].id) == kept[-1:]


def test_threads_and_processes_share_it(tmp_path: Path) -> None:
    path = tmp_path / "db"
    script = "import sys; sys.path.insert(0, sys.argv[3]); from test_records import *\n"
    script += "r = Records(Path(sys.argv[1]))\nfor i in range(20): r.add(row(f'p{sys.argv[2]}x{i}'))"
    children = [subprocess.Popen([sys.executable, "-c", script, path, str(n), Path(__file__).parent]) for n in range(4)]
    mine = Records(path)
    threads = [threading.Thread(target=lambda n=n: [mine.add(row(f"t{n}x{i}")) for i in range(20)]) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait(60) for child in children] == [0] * 4
    rows = mine.rows()
    assert sorted(found.slot for found in rows) == list(range(1, 141))


def _child(records: Records, number: int) -> None:
    for turn in range(10):
        records.add(row(f"c{number}x{turn}"))
    os._exit(0 if len(records.rows()) >= 10 else 1)


@pytest.fixture
def all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many events are written down, for as long as the others take."""
    monkeypatch.setattr(module, "KEPT_EVENTS", 1 << 40)


def noted(records: Records) -> int:
    with records.reading() as connection:
        return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])


def test_forks_in_the_middle_of_transactions(records: Records, all_kept: None) -> None:
    """A thread writes without pause while children are forked: every write of everybody arrives."""
    done = threading.Event()
    wrote = 0

    def write() -> None:
        nonlocal wrote
        while not done.is_set():
            records.note("swept", str(wrote))
            wrote += 1

    writer = threading.Thread(target=write)
    writer.start()
    children = [FORK.Process(target=_child, args=(records, number)) for number in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    done.set()
    writer.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert len(records.rows()) == 60
    assert noted(records) == wrote
    connection = sqlite3.connect(records.path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def _write_for_ever(path: Path) -> None:
    mine = Records(path)
    for number in range(1_000_000):
        mine.note("swept", str(number))


def test_a_writer_killed_at_any_time_loses_nothing(records: Records, all_kept: None) -> None:
    for _ in range(5):
        child = FORK.Process(target=_write_for_ever, args=(records.path,))
        before = noted(records)
        child.start()
        deadline = time.monotonic() + 30
        while noted(records) < before + 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert noted(records) >= before + 20
    records.add(row("after"))


def test_a_newer_schema_is_refused(records: Records) -> None:
    connection = sqlite3.connect(records.path)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(StorageError, match="newer"):
        Records(records.path)


@pytest.mark.parametrize("garbage", [b"hello, I am no database" * 100, b"SQLite format 3\0" + b"\xff" * 8000])
def test_garbage_is_a_storage_error(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "db"
    path.write_bytes(garbage)
    with pytest.raises(StorageError):
        Records(path)


def test_a_damaged_row_is_a_storage_error(records: Records) -> None:
    records.add(row("web"))
    connection = sqlite3.connect(records.path)
    connection.execute("UPDATE machines SET spec = '{'")
    connection.commit()
    connection.close()
    with pytest.raises(StorageError, match="web"):
        records.rows()


def test_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Records(tmp_path / "no" / "db")
