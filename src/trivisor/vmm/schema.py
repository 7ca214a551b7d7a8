"""The tables of a home's database (records.py, snapshots/table.py), as the steps in which they came about."""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE machines (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, slot INTEGER NOT NULL UNIQUE, spec TEXT NOT NULL,
            digest TEXT NOT NULL, state TEXT NOT NULL, operation TEXT NOT NULL DEFAULT '', operator TEXT NOT NULL DEFAULT '',
            owner TEXT NOT NULL DEFAULT '', boot_id TEXT NOT NULL DEFAULT '', created REAL NOT NULL, started REAL, ended REAL,
            status INTEGER, reason TEXT NOT NULL DEFAULT '', facts TEXT NOT NULL DEFAULT '{}') STRICT""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, machine TEXT NOT NULL,
            name TEXT NOT NULL, detail TEXT NOT NULL) STRICT""",
    ),
    ("ALTER TABLE machines ADD COLUMN oom_kills INTEGER NOT NULL DEFAULT 0",),
    (
        "ALTER TABLE machines ADD COLUMN granted INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    ),
    (
        "ALTER TABLE machines ADD COLUMN base TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE machines ADD COLUMN ice TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE machines ADD COLUMN ancestor TEXT NOT NULL DEFAULT ''",
        """CREATE TABLE frozen (
            id TEXT PRIMARY KEY, kind TEXT NOT NULL, machine TEXT NOT NULL, name TEXT NOT NULL, ref TEXT UNIQUE,
            maker TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL, expires REAL, keep INTEGER NOT NULL DEFAULT 0,
            parent TEXT NOT NULL DEFAULT '', digest TEXT NOT NULL, spec TEXT NOT NULL, about TEXT NOT NULL DEFAULT '{}') STRICT""",
    ),
)
