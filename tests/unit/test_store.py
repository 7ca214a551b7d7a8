"""The store: what is in it is whole, what is needed stays, what is not goes; whoever dies or meets, whenever."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from squash_support import make_home
from tar_maker import END, file

from trivisor.core.errors import CallerError, NotFound, StorageError
from trivisor.core.process import start_time
from trivisor.images.catalog import Images
from trivisor.store import database
from trivisor.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check(store: Store) -> None:
    """What must be true at any time: every blob is what its name says, every need is met."""
    blobs = {f"sha256:{path.name}": path.read_bytes() for path in (store.root / "blobs/sha256").iterdir()}
    assert all(digest(data) == name for name, data in blobs.items())
    assert {name for name, _ in store.pins()} | {ref.digest for ref in store.refs()} <= blobs.keys()


def clean(store: Store, deadline: float = 60) -> None:
    """After a collect nothing is there but what is needed. A killed importer's sqfstar may take a moment to end."""
    end = time.monotonic() + deadline
    while True:
        store.collect()
        if not list((store.root / "tmp").iterdir()):
            break
        assert time.monotonic() < end, list((store.root / "tmp").rglob("*"))
        time.sleep(0.02)  # the end of a process that is not our child has no event
    check(store)
    needed = store.reached()
    assert {name for name, _ in store.pins()} | {ref.digest for ref in store.refs()} <= needed
    assert {f"sha256:{path.name}" for path in (store.root / "blobs/sha256").iterdir()} == needed
    with sqlite3.connect(store.root / "index.db") as index:
        assert index.execute("SELECT count(*) FROM pins WHERE owner LIKE 'lease:%'").fetchone() == (0,)
        assert index.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_add_pin_collect(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    name = store.add(io.BytesIO(data), "me")
    assert name == digest(data) and store.path(name).read_bytes() == data and store.exists(name)
    assert store.path(name).stat().st_mode & 0o777 == 0o444
    (tmp_path / "file").write_bytes(data)
    assert store.add(tmp_path / "file", "you") == name
    assert store.pins() == [(name, "me"), (name, "you")]
    assert store.collect() == 0
    store.unpin("me")
    assert store.collect() == 0 and store.exists(name)
    store.unpin("you", name)
    assert store.collect() == len(data) and not store.exists(name)
    with pytest.raises(NotFound):
        store.path(name)
    with pytest.raises(NotFound):
        store.pin(name, "me")
    clean(store)


def test_adopt_moves(store: Store) -> None:
    with store.workspace() as work:
        made = work.path / "x"
        made.write_bytes(b"made")
        name = store.adopt(made, work.owner)
        assert not made.exists() and store.collect() == 0 and store.exists(name)
        assert store.pins() == []
    assert store.collect() == 4
    clean(store)


def test_what_is_not_a_digest(store: Store) -> None:
    for bad in ("", "sha256:", "sha256:../../x", "sha256:" + "G" * 64, "md5:" + "0" * 64, "sha256:" + "0" * 64 + "\n"):
        with pytest.raises(NotFound):
            store.path(bad)


def test_wrong_data_is_refused(store: Store) -> None:
    with pytest.raises(StorageError, match="damaged on its way"):
        store.add(io.BytesIO(b"x"), "me", expected=digest(b"y"))
    assert store.add(io.BytesIO(b"y"), "me", expected=digest(b"y"))
    store.unpin("me")
    clean(store)


def test_a_source_that_fails_leaves_nothing(store: Store) -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1, /) -> bytes:
            raise OSError(5, "line broken")

    with pytest.raises(OSError, match="line broken"):
        store.add(Broken(), "me")
    with pytest.raises(FileNotFoundError):
        store.add(store.root / "nothing", "me")
    assert list((store.root / "tmp").iterdir()) == []
    clean(store)


def test_links_are_reached(store: Store) -> None:
    low = store.add(io.BytesIO(b"low"), "x")
    middle = store.add(io.BytesIO(b"middle"), "x", links=[low])
    top = store.add(io.BytesIO(b"top"), "x", links=[middle])
    store.set_ref("name", top, {"a": [1]})
    store.unpin("x")
    assert store.collect() == 0 and store.exists(low)
    assert [(ref.name, ref.digest, ref.value) for ref in store.refs("na")] == [("name", top, {"a": [1]})]
    assert store.refs("nb") == []
    store.pin(middle, "y")
    store.drop_ref("name")
    assert store.collect() == 3 and store.exists(low) and store.exists(middle)
    store.unpin("y")
    assert store.collect() == 9
    with pytest.raises(NotFound):
        store.drop_ref("name")
    with pytest.raises(NotFound):
        store.set_ref("name", top, {})
    clean(store)


def test_a_ref_that_is_needed_stays(store: Store) -> None:
    name = store.add(io.BytesIO(b"x"), "web")
    store.set_ref("a", name, {})
    with pytest.raises(CallerError, match="used by web"):
        store.drop_ref("a")
    store.set_ref("b", name, {})
    store.drop_ref("a")
    store.unpin("web")
    store.drop_ref("b")
    clean(store)


def test_the_sweep_takes_the_dead_only(store: Store) -> None:
    with store.workspace() as mine:
        tmp = mine.path.parent
        (tmp / f"{os.getpid()}-1-ab").mkdir()  # our pid, another's start time: that process is gone
        (tmp / "999999999-5-cd/deep").mkdir(parents=True)
        (tmp / f"{os.getppid()}-{start_time(os.getppid())}-ef").mkdir()
        (tmp / "note").mkdir()
        store.collect()
        assert {path.name for path in tmp.iterdir()} == {mine.path.name, f"{os.getppid()}-{start_time(os.getppid())}-ef", "note"}
    assert not mine.path.exists()


def test_a_lock_outweighs_a_name(store: Store) -> None:
    """A maker in another pid namespace: its name means nothing here, its lock does."""
    import fcntl

    store.open()
    folder = store.root / "tmp" / "999999999-5-cd"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    store.collect()
    assert folder.exists()
    os.close(lock)
    store.collect()
    assert not folder.exists()


def test_damaged_and_later_databases(store: Store) -> None:
    store.add(io.BytesIO(b"x"), "me")
    with sqlite3.connect(store.root / "index.db") as index:
        index.execute("PRAGMA user_version=99")
    with pytest.raises(StorageError, match="later Trivisor") as caught:
        store.pins()
    assert caught.value.hint
    for path in store.root.glob("index.db*"):
        path.unlink()
    (store.root / "index.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="damaged") as caught:
        store.pins()
    assert caught.value.hint


def test_a_lock_held_too_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(io.BytesIO(b"x"), "me")
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with database.transaction(store.root / "index.db"):
        with pytest.raises(StorageError, match="held the database"):
            store.unpin("me")
        assert store.pins()  # readers do not wait for writers


# Many at once


def _work(root: Path, seed: int, results: multiprocessing.Queue | None) -> None:
    store = Store(root)
    choose = random.Random(seed)
    try:
        for _ in range(25):
            data = bytes([choose.randrange(4)]) * choose.choice([1, 100_000])
            owner = f"owner{seed}"
            name = store.add(io.BytesIO(data), owner)
            if choose.random() < 0.5:
                store.collect()
            # Pinned: nobody's collect may have taken it, also one that met another's unpin.
            assert store.path(name).read_bytes() == data
            store.set_ref(f"ref{choose.randrange(3)}", name, {})
            store.unpin(owner)
        if results is not None:
            results.put("done")
    except BaseException as error:
        if results is None:
            raise
        results.put(repr(error))


def test_processes_that_add_and_collect(tmp_path: Path) -> None:
    results: multiprocessing.Queue = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=_work, args=(tmp_path, seed, results)) for seed in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=100) for _ in workers] == ["done"] * 4
    for worker in workers:
        worker.join()
    clean(Store(tmp_path))


def test_threads_and_forks_of_one_store(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            _work(tmp_path, seed, None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    pids = []
    for seed in range(10, 13):  # forked while threads hold transactions open
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _work(tmp_path, seed, None)
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    for thread in threads:
        thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert errors == []
    clean(Store(tmp_path))


# Killed at every step: a child runs the work under an audit hook (sys.addaudithook) and kills itself at event N:
# opening, renaming, making and removing files, starting programs, connecting to the database. SQL statements are counted too.


def run_killed(work: Callable[[], object], at: int) -> bool:
    """Run `work` in a fork that dies by SIGKILL at its event number `at`. Tell whether it came to its end before."""
    pid = os.fork()
    if pid == 0:
        try:
            count = 0

            def step(name: str) -> None:
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            watched = ("open", "os.", "shutil.", "sqlite3.", "subprocess.", "fcntl.")
            sys.addaudithook(lambda name, args: step(name) if name.startswith(watched) else None)
            real = sqlite3.connect

            def connect(*args: object, **kwargs: object) -> sqlite3.Connection:
                connection = real(*args, **kwargs)  # type: ignore[call-overload]
                connection.set_trace_callback(step)
                return connection

            sqlite3.connect = connect  # type: ignore[assignment]
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def kills(work: Callable[[], object]) -> Iterator[int]:
    for at in range(1, 2000):
        ended = run_killed(work, at)
        yield at
        if ended:
            assert at > 20
            return


def test_kill_at_each_step_of_add_and_collect(store: Store) -> None:
    old = store.add(io.BytesIO(b"old"), "x")
    store.set_ref("name", old, {})
    store.unpin("x")
    new = digest(b"new")

    def work() -> None:
        name = store.add(io.BytesIO(b"new"), "y")
        store.set_ref("name", name, {})
        store.unpin("y")
        store.collect()

    for _ in kills(work):
        check(store)
        assert [ref.digest for ref in store.refs()] in ([old], [new])
        clean(store)
        store.set_ref("name", store.add(io.BytesIO(b"old"), "x"), {})
        store.unpin("x")
        store.unpin("y")
        clean(store)


def test_kill_at_each_step_of_the_first_use(tmp_path: Path) -> None:
    for at in kills_of_new(tmp_path):
        store = Store(tmp_path / str(at))
        store.add(io.BytesIO(b"x"), "x")
        clean(store)


def kills_of_new(tmp_path: Path) -> Iterator[int]:
    for at in range(1, 500):
        ended = run_killed(lambda at=at: Store(tmp_path / str(at)).add(io.BytesIO(b"x"), "y"), at)
        yield at
        if ended:
            return


def test_kill_at_each_step_of_an_import(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    images = Images(home)
    archive = tmp_path / "archive"
    archive.write_bytes(file("a", b"old" * 1000) + END)
    old = images.import_(archive, "x")
    archive.write_bytes(file("a", b"new" * 1000) + END)
    seen = set()
    for _ in kills(lambda: images.import_(archive, "x")):
        found = images.get("x")
        seen.add(found.digest)
        clean(Store(home.store))
        if found.digest != old.digest:
            other = tmp_path / "other"
            other.write_bytes(file("a", b"old" * 1000) + END)
            assert images.import_(other, "x").digest == old.digest
    assert len(seen) == 2
