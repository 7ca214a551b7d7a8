"""The store's index: who needs which blob. The blobs themselves are the truth about what is there.

A connection lives for one transaction. Opening one takes a tenth of a millisecond, and nothing is left
that a fork could carry into a child or that two threads could share. Writers begin immediately, so that
what a transaction reads stays true until it commits. Commits reach the disk (synchronous=FULL): a pin
that was lost with the power would let an image go while a machine needs it.
"""

from __future__ import annotations

import sqlite3
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


@contextmanager
def transaction(path: Path, *, write: bool = True) -> Iterator[sqlite3.Connection]:
    """One transaction on the index at `path`, made and migrated at need. Raises StorageError."""
    try:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    try:
        _prepare(connection, path)
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    finally:
        connection.close()


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA synchronous=FULL")
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
