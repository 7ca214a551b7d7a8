"""The rows of frozen machines in the home's database.

A row is there before its folder is made and goes after that went. `maker` stands in it for as long as it is made, or removed: one whose
maker is dead is nobody's. What machines need is in their rows (`base`, `ice`), so that "nobody needs it" is asked and acted upon in one
transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from trivisor.core import spec as specs
from trivisor.core.errors import AlreadyExists, StorageError
from trivisor.core.process import Who
from trivisor.vmm.records import Records
from trivisor.vmm.snapshots.model import About, Kept, Kind

_COLUMNS = Kept.__struct_fields__
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM frozen"  # noqa: S608 - no input in it
_USERS = "SELECT name FROM machines WHERE ice = :id OR instr(' ' || base || ' ', ' ' || :id || ' ') > 0"


def add(records: Records, kept: Kept) -> None:
    """Write down one that is about to be made. Raises AlreadyExists for a ref that is taken."""
    marks = ", ".join("?" * len(_COLUMNS))
    with records.writing() as connection:
        try:
            values = [_stored(name, getattr(kept, name)) for name in _COLUMNS]
            connection.execute(f"INSERT INTO frozen ({', '.join(_COLUMNS)}) VALUES ({marks})", values)  # noqa: S608
        except sqlite3.IntegrityError as error:
            raise AlreadyExists(f"there is a snapshot {kept.ref}", machine=kept.name, hint="give another name, or remove it") from error


def get(records: Records, frozen: str) -> Kept | None:
    with records.reading() as connection:
        values = connection.execute(f"{_SELECT} WHERE id = ?", (frozen,)).fetchone()
        return _kept(values) if values else None


def find(records: Records, key: str) -> list[Kept]:
    """Return the one with that ref, or those whose ids begin with `key`."""
    with records.reading() as connection:
        if values := connection.execute(f"{_SELECT} WHERE ref = ?", (key,)).fetchone():
            return [_kept(values)]
        if not key:
            return []
        return [_kept(values) for values in connection.execute(f"{_SELECT} WHERE substr(id, 1, ?) = ? LIMIT 10", (len(key), key))]


def rows(records: Records) -> list[Kept]:
    """Return all, the oldest first."""
    with records.reading() as connection:
        return [_kept(values) for values in connection.execute(f"{_SELECT} ORDER BY created, id")]


def update(records: Records, frozen: str, *, durable: bool = False, **changes: Any) -> Kept | None:
    """Change columns, and return the new row; None if it is gone."""
    with records.writing(durable=durable) as connection:
        names = ", ".join(f"{name} = ?" for name in changes)
        values = [_stored(name, value) for name, value in changes.items()]
        connection.execute(f"UPDATE frozen SET {names} WHERE id = ?", (*values, frozen))  # noqa: S608
        found = connection.execute(f"{_SELECT} WHERE id = ?", (frozen,)).fetchone()
        return _kept(found) if found else None


def users(records: Records, frozen: str) -> list[str]:
    """Return the names of the machines that need it."""
    with records.reading() as connection:
        return [name for (name,) in connection.execute(_USERS, {"id": frozen})]


def claim(records: Records, frozen: str, kinds: Sequence[Kind], *, mine: bool = False) -> bool:
    """Take one of these kinds that no machine needs and nobody but, if it is `mine`, the caller works on, to remove it; say whether it
    is taken."""
    with records.writing() as connection:
        found = connection.execute(f"{_SELECT} WHERE id = ?", (frozen,)).fetchone()
        if found is None or connection.execute(_USERS, {"id": frozen}).fetchone():
            return False
        kept = _kept(found)
        if kept.kind not in kinds or (kept.maker is not None and kept.maker.alive() and not (mine and kept.maker == Who.me())):
            return False
        connection.execute("UPDATE frozen SET kind = ?, ref = NULL, maker = ? WHERE id = ?", (Kind.GONE.value, str(Who.me()), frozen))
        return True


def remove(records: Records, frozen: str) -> None:
    """Strike one out. That it is gone already is no error."""
    with records.writing() as connection:
        # What came after it came after what was before it.
        for columns in ("frozen SET parent", "machines SET ancestor"):
            name = columns.rpartition(" ")[2]
            found = "(SELECT parent FROM frozen WHERE id = :id)"
            connection.execute(f"UPDATE {columns} = ifnull({found}, '') WHERE {name} = :id", {"id": frozen})
        connection.execute("DELETE FROM frozen WHERE id = ?", (frozen,))


def _stored(name: str, value: Any) -> Any:
    if name == "spec":
        return specs.encode(value).decode()
    if name == "about":
        return msgspec.json.encode(value).decode()
    if name == "maker":
        return str(value) if value is not None else ""
    return value.value if isinstance(value, Kind) else int(value) if isinstance(value, bool) else value


def _kept(values: Sequence[Any]) -> Kept:
    named = dict(zip(_COLUMNS, values, strict=True))
    try:
        named["spec"] = specs.decode(named["spec"])
        named["about"] = msgspec.json.decode(named["about"], type=About)
        named["kind"] = Kind(named["kind"])
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageError(f"the record of the snapshot {named['ref'] or named['id']} is damaged: {error}") from error
    named["maker"] = Who.parse(named["maker"])
    named["keep"] = bool(named["keep"])
    return Kept(**named)
