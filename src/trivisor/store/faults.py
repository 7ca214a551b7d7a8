"""The one edge at which the store's OSError and sqlite3.Error become StorageError."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.core.errors import StorageError

_HINTS = {
    errno.ENOSPC: "free some space (`trivisor images rm`), or set TRIVISOR_HOME to a folder on a larger disk",
    errno.EDQUOT: "your disk quota is used up: free some space, or set TRIVISOR_HOME to another disk",
    errno.EROFS: "set TRIVISOR_HOME to a writable folder",
    errno.EACCES: "set TRIVISOR_HOME to a folder of your own",
    errno.EPERM: "set TRIVISOR_HOME to a folder of your own",
    errno.EIO: "the disk reports read or write errors: look at the kernel log (dmesg)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


def from_os(error: OSError, where: Path) -> StorageError:
    """Return what to raise for `error`, met while using `where`."""
    return StorageError(f"{where}: {error.strerror or error}", hint=_HINTS.get(error.errno or 0, ""))


def from_sqlite(error: sqlite3.Error, where: Path) -> StorageError:
    """Return what to raise for a failure of the database at `where`."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits say which kind of failing read or write it was
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageError(f"{where}: another process has held the database for too long", hint="see which with: fuser -v " + str(where))
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StorageError(f"{where}: the database is damaged ({error})", hint=f"move {where.parent} away; images are then made anew")
    return StorageError(f"{where}: {error}", hint=_HINTS.get(_SQLITE.get(primary, 0), ""))


@contextmanager
def translated(where: Path) -> Iterator[None]:
    """Raise StorageError for any OSError or sqlite3.Error of the block."""
    try:
        yield
    except OSError as error:
        raise from_os(error, where) from error
    except sqlite3.Error as error:
        raise from_sqlite(error, where) from error
