"""Content-addressed blobs: written aside, verified, renamed into place; kept while something reaches them.

    store/blobs/sha256/<hex>    whole and right, always: a blob appears by rename(2) after fsync(2)
    store/index.db              pins (who needs it), refs (names), links (blob to blob)
    store/tmp/PID-START-*       workspaces

The rename happens inside the same write transaction as the pin, and collection moves garbage aside inside
one too. So of an add and a collect that meet, one comes wholly first: either the collect sees the pin, or
the add sees that the blob is gone and puts its own in place. A process that dies anywhere leaves at most
a workspace and a blob that nothing reaches; the next collect removes both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trivisor.core.errors import CallerError, NotFound, StorageError
from trivisor.core.files import sync
from trivisor.store import workspace as workspaces
from trivisor.store.database import release, transaction
from trivisor.store.faults import translated
from trivisor.store.workspace import LEASE, Workspace

ALGORITHM = "sha256"
CHUNK = 1 << 20
_DIGEST = re.compile(rf"{ALGORITHM}:[0-9a-f]{{64}}")


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Ref:
    """A name for a blob, with a value (JSON) that its owner gave it."""

    name: str
    digest: str
    value: dict[str, Any]


class Store:
    """The blobs under one folder. Threads, forks and other processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / ALGORITHM
        self._tmp = root / "tmp"
        self._index = root / "index.db"

    def open(self) -> None:
        """Make the folders. Raises StorageError."""
        with translated(self.root):
            for folder in (self._blobs, self._tmp):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def workspace(self) -> AbstractContextManager[Workspace]:
        """A folder to make things in, gone at the end; its `owner` may pin blobs meanwhile."""
        self.open()
        return workspaces.workspace(self._tmp)

    # Blobs

    def add(self, source: Readable | Path, owner: str, *, expected: str = "", links: Iterable[str] = ()) -> str:
        """Copy `source` into the store, pinned by `owner`, and return its digest ("sha256:...").

        `expected` is the digest that it must have; `links` are the digests of blobs that it needs.
        Raises StorageError (disk full or read-only, wrong digest), OSError if `source` cannot be read.
        """
        if isinstance(source, Path):
            with source.open("rb") as file:
                return self.add(file, owner, expected=expected, links=links)
        with self.workspace() as work:
            aside = work.path / "blob"
            with translated(self.root):
                sink = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                digest = _copy(source, lambda data: self._write(sink, data))
            finally:
                os.close(sink)
            return self._place(aside, digest, owner, expected, links)

    def adopt(self, path: Path, owner: str, *, expected: str = "", known: str = "", links: Iterable[str] = ()) -> str:
        """Like `add`, for a file made in a workspace: it is moved, not copied.

        `known` is its digest where its maker counted it while writing; then it is not read again.
        """
        if not known:
            with translated(path), path.open("rb") as file:
                known = _copy(file, None)
        return self._place(path, known, owner, expected, links)

    def hold(self, digest: str, owner: str) -> bool:
        """Pin `digest` for `owner` if it is there, and tell whether it is: what is asked for before it is fetched again."""
        try:
            self.pin(digest, owner, durable=False)
        except NotFound:
            return False
        return True

    def path(self, digest: str) -> Path:
        """Return where the blob is. Raises NotFound if it is not there."""
        path = self.locate(digest)
        if not path.exists():
            raise NotFound(f"there is no blob {digest} in {self.root}", hint="import the image again")
        return path

    def locate(self, digest: str) -> Path:
        """Return where the blob is, if it is there. Raises NotFound for what is not a digest."""
        if not _DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r} is not a digest", hint="a digest is sha256: and 64 hexadecimal digits")
        return self._blobs / digest.partition(":")[2]

    def exists(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        return self.locate(digest).exists()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each blob that is there. Raises StorageError."""
        found: dict[str, int] = {}
        self.open()
        with translated(self.root):
            for path in self._blobs.iterdir():
                with suppress(FileNotFoundError):  # collected meanwhile
                    found[f"{ALGORITHM}:{path.name}"] = path.stat().st_size
        return found

    def damage(self, digest: str) -> str:
        """Read the blob and say what is wrong with it, "" if nothing."""
        path = self.locate(digest)
        try:
            with path.open("rb") as file:
                found = _copy(file, None)
        except FileNotFoundError:
            return f"the blob {digest} is gone"
        except OSError as error:
            return f"the blob {digest} cannot be read: {error.strerror}"
        return "" if found == digest else f"the blob {digest} is damaged: what is in {path} is {found}"

    # Who needs what

    def pin(self, digest: str, owner: str, *, durable: bool = True) -> None:
        """Keep `digest`, and what it links to, until `owner` unpins it. Raises NotFound if it is not there.

        Without `durable` a power cut may take the pin: for an owner that it takes as well.
        """
        with self._transaction(durable=durable) as index:
            self.path(digest)  # inside the transaction: no collect can take it before the pin is there
            index.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (digest, owner))

    def unpin(self, owner: str, digest: str | None = None) -> None:
        """Drop the owner's pin on `digest`, or all the owner's pins. Unknown ones are no error. A power cut may bring it back."""
        with self._transaction(durable=False) as index:
            index.execute("DELETE FROM pins WHERE owner = ? AND digest = coalesce(?, digest)", (owner, digest))

    def pins(self) -> list[tuple[str, str]]:
        """Return (digest, owner) of every pin but the leases of work under way."""
        with self._transaction(write=False) as index:
            rows = index.execute("SELECT digest, owner FROM pins WHERE substr(owner, 1, ?) != ? ORDER BY 1, 2", (len(LEASE), LEASE))
            return [(digest, owner) for digest, owner in rows]

    def set_ref(self, name: str, digest: str, value: dict[str, Any]) -> None:
        """Let `name` mean `digest` from now on. Raises NotFound if the blob is not there."""
        with self._transaction() as index:
            self.path(digest)
            index.execute("INSERT OR REPLACE INTO refs VALUES (?, ?, ?)", (name, digest, json.dumps(value)))

    def refs(self, prefix: str = "") -> list[Ref]:
        """Return the refs whose name begins with `prefix`, by name."""
        with self._transaction(write=False) as index:
            rows = index.execute("SELECT * FROM refs WHERE substr(name, 1, ?) = ? ORDER BY name", (len(prefix), prefix)).fetchall()
        return [Ref(name, digest, json.loads(value)) for name, digest, value in rows]

    def drop_ref(self, name: str, *, force: bool = False) -> None:
        """Forget `name`. Raises NotFound, and without `force` CallerError if a blob that somebody pinned would have no name any more.

        A blob that another ref names too is taken from nobody; a pinned one stays either way.
        """
        with self._transaction() as index:
            row = index.execute("SELECT digest FROM refs WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise NotFound(f"there is no {name}")
            (others,) = index.execute("SELECT count(*) FROM refs WHERE digest = ? AND name != ?", (row[0], name)).fetchone()
            owners = [owner for (owner,) in index.execute("SELECT owner FROM pins WHERE digest = ? ORDER BY owner", row)]
            owners = [owner for owner in owners if not owner.startswith(LEASE)]
            if owners and not others and not force:
                raise CallerError(f"{name} is used by {', '.join(owners)}", hint="delete what uses it first")
            index.execute("DELETE FROM refs WHERE name = ?", (name,))

    def reached(self, without: Iterable[str] = ()) -> set[str]:
        """Return the digests that a pin, a ref or a lease needs, with all that those link to; as if the refs `without` were dropped."""
        left_out = frozenset(without)
        with self._transaction() as index:
            return self._reached(index, left_out)

    def close(self) -> None:
        """Let go of the index; it is opened again when needed."""
        release(self._index)

    # Garbage

    def collect(self) -> int:
        """Remove what no pin and no ref reaches, and what dead processes left. Return the bytes freed."""
        self.open()
        with translated(self._tmp):
            workspaces.sweep(self._tmp)
        freed = 0
        # Unlinking gigabytes takes a while: inside the transaction blobs only move into the workspace.
        with self.workspace() as trash, self._transaction() as index, translated(self.root):
            reached = self._reached(index)
            for path in self._blobs.iterdir():
                if f"{ALGORITHM}:{path.name}" not in reached:
                    freed += path.stat().st_size
                    path.rename(trash.path / path.name)
                    index.execute("DELETE FROM links WHERE parent = ?", (f"{ALGORITHM}:{path.name}",))
        return freed

    def _reached(self, index: sqlite3.Connection, without: frozenset[str] = frozenset()) -> set[str]:
        for (owner,) in index.execute("SELECT DISTINCT owner FROM pins WHERE substr(owner, 1, ?) = ?", (len(LEASE), LEASE)).fetchall():
            if not workspaces.leased(self._tmp, owner):
                index.execute("DELETE FROM pins WHERE owner = ?", (owner,))
        links: dict[str, list[str]] = {}
        for parent, child in index.execute("SELECT parent, child FROM links"):
            links.setdefault(parent, []).append(child)
        left = [digest for (digest,) in index.execute("SELECT digest FROM pins")]
        left += [digest for name, digest in index.execute("SELECT name, digest FROM refs") if name not in without]
        found: set[str] = set()
        while left:
            if (digest := left.pop()) not in found:
                found.add(digest)
                left += links.get(digest, ())
        return found

    # Inside

    def _write(self, sink: int, data: bytes) -> None:
        view = memoryview(data)
        with translated(self.root):
            while view:
                view = view[os.write(sink, view) :]

    def _transaction(self, *, write: bool = True, durable: bool = True) -> AbstractContextManager[sqlite3.Connection]:
        if not os.path.exists(self._index):  # noqa: PTH110 - raises nothing
            self.open()
        return transaction(self._index, write=write, durable=durable)

    def _place(self, aside: Path, digest: str, owner: str, expected: str, links: Iterable[str]) -> str:
        if expected and digest != expected:
            raise StorageError(f"the data is {digest}, not {expected}: it was damaged on its way", hint="fetch it again")
        target = self.locate(digest)
        with translated(self.root):
            # Readable to all: the home is 0700, and a jailed engine of another uid gets this one file.
            aside.chmod(0o444)
            sync(aside)
        with self._transaction() as index, translated(self.root):
            index.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (digest, owner))
            index.executemany("INSERT OR IGNORE INTO links VALUES (?, ?)", [(digest, link) for link in links])
            # One that is there is the same file, and machines share its pages; but a truncated one is put right.
            if not target.exists() or target.stat().st_size != aside.stat().st_size:
                aside.rename(target)
                sync(self._blobs)
        return digest


def _copy(source: Readable, sink: Callable[[bytes], object] | None) -> str:
    sha = hashlib.new(ALGORITHM)
    while data := source.read(CHUNK):
        sha.update(data)
        if sink is not None:
            sink(data)
    return f"{ALGORITHM}:{sha.hexdigest()}"
