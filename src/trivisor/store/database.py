"""The store's index: who needs which blob. The blobs themselves are the truth about what is there.

A connection serves one transaction at a time. One that is idle is kept for the next, since the last one to close
would write the whole log back, which takes a millisecond and four trips to the disk; it is closed before a fork, so that no
child has it. Writers begin immediately, so that what a transaction reads stays true until it commits. Commits reach the
disk (synchronous=FULL) unless they only give something up: a pin that was lost with the power would let an image go while a
machine needs it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.store.faults import from_sqlite

BUSY_SECONDS = 30.0
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE pins (digest TEXT NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (digest, owner)) WITHOUT ROWID",
        "CREATE INDEX pins_owner ON pins (owner)",
        # A ref is a named pin with a value: what the catalog of images is made of.
        "CREATE TABLE refs (name TEXT PRIMARY KEY, digest TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID",
        # Blobs that name other blobs: a manifest its layers. What is reachable from a pin or a ref stays.
        "CREATE TABLE links (parent TEXT NOT NULL, child TEXT NOT NULL, PRIMARY KEY (parent, child)) WITHOUT ROWID",
    ),
)
"""Entry N brings the schema from version N to N + 1."""


_File = tuple[int, int]
_lock = threading.RLock()
"""Held for each transaction and over each fork: SQLite has locks of its own for the whole process, and a child forked while
another thread held one would wait for it for ever."""
_idle: dict[Path, tuple[_File, sqlite3.Connection]] = {}
_hooked: list[bool] = []


def _which(path: Path) -> _File | None:
    """The file that lies at `path` now: a home may be removed, and another made in its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _take(path: Path) -> sqlite3.Connection:
    file, connection = _idle.pop(path, (None, None))
    if connection is not None:
        if file == _which(path):
            return connection
        connection.close()
    return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _keep(path: Path, connection: sqlite3.Connection) -> None:
    file = _which(path)
    if file is not None and path not in _idle:
        _idle[path] = (file, connection)
    else:
        connection.close()


@contextmanager
def _unforked() -> Iterator[None]:
    with _lock:
        if not _hooked:
            _hooked.append(True)
            os.register_at_fork(before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release)
        yield


def _before_fork() -> None:
    _lock.acquire()
    for _, connection in _idle.values():
        connection.close()
    _idle.clear()


def release(path: Path) -> None:
    """Close the idle connection to the index at `path`, if there is one."""
    with _lock:
        _, connection = _idle.pop(path, (None, None))
        if connection is not None:
            connection.close()


@contextmanager
def transaction(path: Path, *, write: bool = True, durable: bool = True) -> Iterator[sqlite3.Connection]:
    """One transaction on the index at `path`, made and migrated at need. Raises StorageError."""
    with _unforked(), _begun(path, write=write, durable=durable) as connection:
        yield connection


@contextmanager
def _begun(path: Path, *, write: bool, durable: bool) -> Iterator[sqlite3.Connection]:
    try:
        connection = _take(path)
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    whole = False
    try:
        _prepare(connection, path, durable)
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield connection
            connection.execute("COMMIT")
            whole = True
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    finally:
        if whole:
            _keep(path, connection)
        else:
            connection.close()


def _prepare(connection: sqlite3.Connection, path: Path, durable: bool) -> None:
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    if _version(connection, path) == len(MIGRATIONS):
        return
    _use_wal(connection)
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Read again: another process may have migrated between the look and the lock.
        for steps in MIGRATIONS[_version(connection, path) :]:
            for step in steps:
                connection.execute(step)
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL. SQLite does not wait here for another process that does the same: it answers busy at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)  # the other's switch takes a millisecond or two


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StorageError(
            f"{path} was written by a later Trivisor (schema {version})", hint="upgrade Trivisor, or use another TRIVISOR_HOME"
        )
    return version
