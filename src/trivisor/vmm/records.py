"""What is written down of machines: one SQLite database a home, in WAL mode, shared by all its processes.

Transactions are short. A row is there before the folder it names is made, and goes after the folder went,
so what no row names is garbage. A row's `operation` says what is being done to the machine and by whom: a
crash leaves it standing, and whoever reads it next puts the machine right (vmm/reconcile.py).

A connection never lives through a fork: SQLite's locks are the process's, and a child that went on with its
parent's would believe in locks that it does not hold. So a fork waits for the transaction of the moment,
and both sides open their own afterwards.

A commit survives the death of any process at once (WAL, synchronous=NORMAL); rows that come and go are
forced to the disk as well, so that a power cut does not turn a machine's folder into garbage. That is not done for
the machines of a process, which a power cut ends with it; nor for the last step of a delete, whose first is on the disk.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core import spec as specs
from trivisor.core.errors import AlreadyExists, StorageError
from trivisor.core.events import Event
from trivisor.core.process import Who
from trivisor.core.spec import Spec
from trivisor.core.state import State
from trivisor.vmm.schema import MIGRATIONS

KEPT_EVENTS = 5000
BUSY_TIMEOUT = 15.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One machine as it is written down. Times are seconds since the epoch."""

    id: str
    name: str
    slot: int
    spec: Spec
    digest: str
    """Of the image its root was made from."""
    state: State
    operation: str = ""
    """The verb that is being carried out, or was when its process died."""
    operator: Who | None = None
    owner: Who | None = None
    """With lifetime="process": whose death is the machine's."""
    boot_id: str = ""
    """The host's, when the machine was last started."""
    created: float
    started: float | None = None
    ended: float | None = None
    status: int | None = None
    """What the guest said as it powered off."""
    reason: str = ""
    facts: dict[str, str] = {}
    """What the engine said of its last start."""
    oom_kills: int = 0
    """Processes that the host's kernel killed in its current or last life, because its memory limit was met."""
    granted: int = 0
    """Bytes that it holds of the home's memory budget (vmm/budget.py); 0 while it is paused or does not run, or if it began without one."""
    base: str = ""
    """The frozen machines (vmm/snapshots) that what it is made of may lie in, by their ids, with spaces between."""
    ice: str = ""
    """The frozen machine whose memory its next start goes on with."""
    ancestor: str = ""
    """The snapshot that was last taken of it, or that it was last made from."""


_COLUMNS = Row.__struct_fields__
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM machines"  # noqa: S608 - no input in it


class Records:
    """The database at `path`. Safe to share between threads; opens itself again after a fork."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        _watch(self)
        with self._connected():
            pass

    def close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()

    def before_fork(self) -> None:
        """Wait for the transaction of the moment, and close what a child must not inherit."""
        self._lock.acquire()
        self.close()

    def after_fork(self) -> None:
        self._lock.release()

    def add(self, row: Row) -> Row:
        """Write down a new machine and return it with a slot of its own. Raises AlreadyExists for a name taken."""
        with self._writing() as connection:  # what follows in a create is forced, and this with it
            taken = {slot for (slot,) in connection.execute("SELECT slot FROM machines")}
            slot = next(number for number in range(1, len(taken) + 2) if number not in taken)
            row = msgspec.structs.replace(row, slot=slot)
            values = [_stored(name, getattr(row, name)) for name in _COLUMNS]
            marks = ", ".join("?" * len(values))
            try:
                connection.execute(f"INSERT INTO machines ({', '.join(_COLUMNS)}) VALUES ({marks})", values)  # noqa: S608
            except sqlite3.IntegrityError as error:
                hint = "give another name, or delete it"
                raise AlreadyExists(f"there is a machine named {row.name}", machine=row.name, hint=hint) from error
        return row

    def rows(self) -> list[Row]:
        """Return every machine, the oldest first."""
        with self._connected() as connection:
            return [_row(values) for values in connection.execute(f"{_SELECT} ORDER BY created, id")]

    def row(self, machine: str) -> Row | None:
        with self._connected() as connection:
            values = connection.execute(f"{_SELECT} WHERE id = ?", (machine,)).fetchone()
            return _row(values) if values else None

    def find(self, key: str) -> list[Row]:
        """Return the machine with that id or else that name, or else all whose ids begin with `key`."""
        with self._connected() as connection:
            for where in ("id = ?", "name = ?"):
                if values := connection.execute(f"{_SELECT} WHERE {where}", (key,)).fetchone():
                    return [_row(values)]
            if not key:
                return []
            # No LIKE: its wildcards would be the caller's.
            query = f"{_SELECT} WHERE substr(id, 1, ?) = ? LIMIT 10"
            return [_row(values) for values in connection.execute(query, (len(key), key))]

    def update(self, machine: str, *, event: tuple[str, str] | None = None, durable: bool = False, **changes: Any) -> Row | None:
        """Change columns of a machine, with an event (kind, detail), and return the new row; None if it is gone."""
        with self._writing(durable=durable) as connection:
            names = ", ".join(f"{name} = ?" for name in changes)
            values = [_stored(name, value) for name, value in changes.items()]
            # RETURNING would save a query, but sqlite3 must then be read to the end before the commit.
            connection.execute(f"UPDATE machines SET {names} WHERE id = ?", (*values, machine))  # noqa: S608
            found = connection.execute(f"{_SELECT} WHERE id = ?", (machine,)).fetchone()
            row = _row(found) if found else None
            if row is not None and event is not None:
                _add_event(connection, event[0], row.id, row.name, event[1])
            return row

    def count_oom(self, machine: str, killed: int, whom: Callable[[int], Sequence[str]]) -> Row | None:
        """Raise the count of kills for want of memory, with an event, unless somebody else did; return the row, None if it is gone."""
        with self._writing() as connection:
            known = connection.execute("SELECT oom_kills, name FROM machines WHERE id = ?", (machine,)).fetchone()
            if known is not None and known[0] < killed:
                connection.execute("UPDATE machines SET oom_kills = ? WHERE id = ?", (killed, machine))
                names = ", ".join(whom(killed - known[0]))
                detail = f"out of memory: the kernel killed {_processes(killed - known[0])}{': ' if names else ''}{names}"
                _add_event(connection, "oom", machine, known[1], detail)
            found = connection.execute(f"{_SELECT} WHERE id = ?", (machine,)).fetchone()
            return _row(found) if found else None

    def note_once(self, kind: str, machine: str, name: str, events: Sequence[tuple[float, str]]) -> set[float]:
        """Write down events of a machine that have times of their own, and return the times of those that were not there yet."""
        with self._connected() as connection:
            if not _unknown(connection, kind, machine, events):
                return set()
        with self._writing() as connection:
            new = _unknown(connection, kind, machine, events)
            for at, detail in new:
                _add_event(connection, kind, machine, name, detail, at)
            return {at for at, _ in new}

    def grant(self, machine: str, decide: Callable[[list[Row]], int]) -> None:
        """Write down what `decide` grants a machine, with no other record changing between its look at all of them and that."""
        with self._writing() as connection:
            granted = decide([_row(values) for values in connection.execute(_SELECT)])
            connection.execute("UPDATE machines SET granted = ? WHERE id = ?", (granted, machine))

    def setting(self, name: str) -> str | None:
        """Return a setting of the home, None if it has no such."""
        with self._connected() as connection:
            found = connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
            return str(found[0]) if found else None

    def set_setting(self, name: str, value: str | None) -> None:
        """Change a setting, for all processes; None takes it away."""
        with self._writing(durable=True) as connection:
            connection.execute("DELETE FROM settings WHERE name = ?", (name,))
            if value is not None:
                connection.execute("INSERT INTO settings (name, value) VALUES (?, ?)", (name, value))

    def remove(self, row: Row, event: tuple[str, str] | None = None) -> None:
        """Strike a machine out. That it is gone already is no error."""
        with self._writing() as connection:
            gone = connection.execute("DELETE FROM machines WHERE id = ?", (row.id,)).rowcount
            if gone and event is not None:
                _add_event(connection, event[0], row.id, row.name, event[1])

    def note(self, kind: str, detail: str = "") -> None:
        """Write down an event of no machine."""
        with self._writing() as connection:
            _add_event(connection, kind, "", "", detail)

    def events(self, since: int = 0, limit: int = 1000) -> list[Event]:
        """Return at most `limit` events with an id above `since`, the oldest first."""
        with self._connected() as connection:
            query = "SELECT id, time, kind, machine, name, detail FROM events WHERE id > ? ORDER BY id LIMIT ?"
            names = Event.__struct_fields__
            return [Event(**dict(zip(names, values, strict=True))) for values in connection.execute(query, (since, limit))]

    def version(self) -> int:
        """Return a number that changes when another process changes something."""
        with self._connected() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For other tables of this database. Raises StorageError."""
        with self._connected() as connection:
            yield connection

    @contextmanager
    def writing(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """The same, in a transaction of the `with`'s."""
        with self._writing(durable=durable) as connection:
            yield connection

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = _open(self.path)
                yield self._connection
            except sqlite3.Error as error:
                raise _translated(error, self.path) from error

    @contextmanager
    def _writing(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._connected() as connection:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # A failed COMMIT may have rolled back by itself.
                if connection.in_transaction:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        _use_wal(connection)
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    # Two processes that switch a new database at once: SQLite tells the second "locked" without waiting.
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    def version() -> int:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])

    if version() < len(MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statements in MIGRATIONS[version() :]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {max(version(), len(MIGRATIONS))}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    if version() > len(MIGRATIONS):
        raise StorageError(f"{path} was written by a newer Trivisor", hint="upgrade this one, or set TRIVISOR_HOME to another folder")


def _unknown(connection: sqlite3.Connection, kind: str, machine: str, events: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return those of a machine's events that are not written down."""
    known = {at for (at,) in connection.execute("SELECT time FROM events WHERE kind = ? AND machine = ?", (kind, machine))}
    # Those from before all that is kept were there once.
    (first,) = connection.execute("SELECT ifnull(min(time), 0) FROM events").fetchone()
    return [(at, detail) for at, detail in events if at not in known and at >= first]


def _add_event(connection: sqlite3.Connection, kind: str, machine: str, name: str, detail: str, at: float | None = None) -> None:
    values = (time.time() if at is None else at, kind, machine, name, detail[:1000])
    new = connection.execute("INSERT INTO events (time, kind, machine, name, detail) VALUES (?, ?, ?, ?, ?)", values).lastrowid
    if new is not None and new % 100 == 0:
        connection.execute("DELETE FROM events WHERE id <= ?", (new - KEPT_EVENTS,))


def _processes(number: int) -> str:
    return "a process in it" if number == 1 else f"{number} processes in it"


def _stored(name: str, value: Any) -> Any:
    """Return what the database holds for a column's value."""
    if name == "spec":
        return specs.encode(value).decode()
    if name == "facts":
        return msgspec.json.encode(value).decode()
    if name in ("operator", "owner"):
        return str(value) if value is not None else ""
    return value.value if isinstance(value, State) else value


def _row(values: Sequence[Any]) -> Row:
    named = dict(zip(_COLUMNS, values, strict=True))
    try:
        named["spec"] = specs.decode(named["spec"])
        named["facts"] = msgspec.json.decode(named["facts"], type=dict[str, str])
        named["state"] = State(named["state"])
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageError(f"the record of machine {named['name']} is damaged: {error}", machine=named["name"]) from error
    named["operator"] = Who.parse(named["operator"])
    named["owner"] = Who.parse(named["owner"])
    return Row(**named)


_HINTS = {
    sqlite3.SQLITE_FULL: ("the disk is full", "free space on its file system"),
    sqlite3.SQLITE_READONLY: ("it is read-only", "set TRIVISOR_HOME to a writable folder"),
    sqlite3.SQLITE_CANTOPEN: ("it cannot be opened", "look at the folder's rights and at the free space on its file system"),
    sqlite3.SQLITE_CORRUPT: ("it is damaged", "move it away, or set TRIVISOR_HOME to another folder"),
    sqlite3.SQLITE_NOTADB: ("it is not a database of ours", "move it away, or set TRIVISOR_HOME to another folder"),
    sqlite3.SQLITE_BUSY: (f"another process has held it for over {BUSY_TIMEOUT:g} s", "look for a process that is stopped in the middle"),
    sqlite3.SQLITE_IOERR: ("input/output error", "look at the free space on its file system, and at the kernel's log"),
}


def _translated(error: sqlite3.Error, path: Path) -> StorageError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    what, hint = _HINTS.get(code, (str(error), ""))
    return StorageError(f"the records {path}: {what}", hint=hint)


_open_records: weakref.WeakSet[Records] = weakref.WeakSet()
_fork_lock = threading.RLock()
_forking: list[Records] = []
_hooked = False


def _watch(records: Records) -> None:
    global _hooked
    _open_records.add(records)
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking.extend(sorted(_open_records, key=id))
    for records in _forking:
        records.before_fork()


def _after_fork() -> None:
    while _forking:
        _forking.pop().after_fork()
    _fork_lock.release()
