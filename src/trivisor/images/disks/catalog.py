"""The disks of a home: what was brought in, by name, each a qcow2 that stands for itself and that nobody writes to.

They lie in a store of their own, by digest, beside that of images: the same disk is there once, whatever it is called, a machine that has
it pins it, and what neither a name nor a machine holds is collected. What is brought in is converted aside, in a workspace.
"""

from __future__ import annotations

import builtins
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivisor.core.devices import disk_name
from trivisor.core.errors import AlreadyExists, NotFound, StorageError
from trivisor.core.files import sync
from trivisor.core.paths import Home
from trivisor.images.disks import formats, qemuimg
from trivisor.images.disks.formats import Format
from trivisor.images.disks.headers import Header
from trivisor.images.disks.qemuimg import DEFAULT, Bounds, Progress, Source
from trivisor.store import workspace as workspaces
from trivisor.store.faults import translated
from trivisor.store.store import Ref, Store
from trivisor.store.workspace import Workspace

_PREFIX = "disk:"


@dataclass(frozen=True)
class StoredDisk:
    """One disk of a home. Sizes are bytes, `created` seconds since the epoch."""

    name: str
    digest: str
    path: Path
    """A qcow2, which nothing may write to."""
    size: int
    """As a machine sees it."""
    stored: int
    """What it takes of the host's disk."""
    format: Format
    """What it came as."""
    source: str
    created: float
    machines: tuple[str, ...] = ()
    """The names of those that have it."""


class Catalog:
    """The disks of one home. Safe to use from threads, forks and many processes at once."""

    def __init__(self, home: Home) -> None:
        self._store = Store(home.disks)
        self._there = home.disks

    def get(self, name: str) -> StoredDisk:
        """Return the disk with that name. Raises NotFound, InvalidSpec, StorageError if its file is gone."""
        for found in self.list():
            if found.name == disk_name(name):
                if not found.path.exists():
                    raise StorageError(f"disk {name} is damaged: {found.path} is gone", hint="remove it, and import it again")
                return found
        raise NotFound(f"there is no disk {name}", hint="`trivisor disk list` lists those there are, `trivisor disk import` brings one in")

    def list(self) -> builtins.list[StoredDisk]:
        """Return every disk, by name."""
        return [self._stored(ref) for ref in self._store.refs(_PREFIX)] if self._there.exists() else []

    def import_(self, path: Path, name: str, kind: Format | None, source: str, bounds: Bounds, progress: Progress) -> StoredDisk:
        """Bring the disk in the file `path` in, under a name that is free. Raises what qemuimg raises, AlreadyExists."""
        self.free(name)
        given = qemuimg.open_source(path, kind, bounds)
        with self.workspace() as work:
            progress(f"reading {path.name}")
            qemuimg.verify(given, bounds)
            made = work.path / "disk"
            header = qemuimg.convert(given, made, "qcow2", bounds=bounds, progress=progress)
            progress("storing the disk")
            digest = self._store.adopt(made, work.owner)
            self.free(name)  # another may have taken it meanwhile
            value = {"created": time.time(), "source": source, "format": given.header.format, "size": header.size}
            self._store.set_ref(_PREFIX + name, digest, value)
        return self.get(name)

    def remove(self, name: str) -> None:
        """Forget the disk, and remove what nobody has. Raises NotFound, CallerError if a machine has it."""
        self.get_ref(name)
        self._store.drop_ref(_PREFIX + name)
        self._store.collect()

    def free(self, name: str) -> None:
        """Raise AlreadyExists if a disk has the name."""
        if any(found.name == disk_name(name) for found in self.list()):
            raise AlreadyExists(f"there is a disk {name} already", hint="choose another name, or remove it first")

    def get_ref(self, name: str) -> str:
        """Return the digest that the name means. Raises NotFound, InvalidSpec."""
        for ref in self._store.refs(_PREFIX) if self._there.exists() else ():
            if ref.name == _PREFIX + disk_name(name):
                return ref.digest
        raise NotFound(f"there is no disk {name}", hint="`trivisor disk list` lists those there are")

    # Who has them

    def pin(self, digest: str, owner: str) -> None:
        """Keep a disk until `owner` unpins it. Raises NotFound if it is gone."""
        self._store.pin(digest, owner)

    def unpin(self, owner: str, digest: str | None = None) -> None:
        """Drop the owner's pin on a disk, or all that it has; what nobody needs is collected with the next that is removed."""
        if self._there.exists():
            self._store.unpin(owner, digest)

    def owners(self) -> dict[str, builtins.list[str]]:
        """Return who has each disk, by digest."""
        found: dict[str, builtins.list[str]] = {}
        for digest, owner in self._store.pins() if self._there.exists() else ():
            found.setdefault(digest, []).append(owner)
        return found

    def digest_of(self, path: str) -> str | None:
        """Return the digest of the disk that lies at `path`, None if none of these does."""
        folder, _, name = path.rpartition("/")
        digest = f"sha256:{name}"
        return digest if len(name) == 64 and Path(folder) == self._store.locate(digest).parent else None

    # Keeping

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """A folder on the store's file system, gone at the end, whose owner may pin disks meanwhile."""
        with self._store.workspace() as work:
            yield work

    def collect(self) -> int:
        """Remove what neither a name nor a machine has, and what crashes left. Return the bytes freed."""
        return self._store.collect() if self._there.exists() else 0

    def sweep(self) -> builtins.list[str]:
        """Remove the workspaces of the dead, and what they had brought in without naming it; say what."""
        tmp = self._there / "tmp"
        removed = workspaces.sweep(tmp) if tmp.is_dir() else []
        if removed:
            self._store.collect()
        return [f"disks {name}: removed, its maker ended" for name in removed]

    def close(self) -> None:
        self._store.close()

    def _stored(self, ref: Ref) -> StoredDisk:
        path = self._store.locate(ref.digest)
        try:
            taken = path.stat().st_blocks * 512
        except OSError:
            taken = 0  # `get` says that it is gone
        value: dict[str, Any] = {key: ref.value[key] for key in ("size", "format", "source", "created")}
        return StoredDisk(ref.name.removeprefix(_PREFIX), ref.digest, path, stored=taken, **value)


def write(source: Source, target: Path, to: Format | None, progress: Progress, *, stream: bool = False, bounds: Bounds = DEFAULT) -> Header:
    """Write a disk to the file `target`, which is replaced once all is written; `to`: as its name says, unless given.

    Raises what qemuimg.convert raises, and InvalidSpec for a name that says no format.
    """
    target = target.absolute()
    kind = to or formats.of_name(target)
    with aside(target) as made:
        return qemuimg.convert(source, made, kind, stream=stream, bounds=bounds, progress=progress)


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Give a name beside `target` for what takes its place at the end, whole or not at all. Raises StorageError, AlreadyExists."""
    if target.exists() and not target.is_file():
        raise AlreadyExists(f"{target} is there, and is no file", hint="name a file")
    if not target.parent.is_dir():
        raise NotFound(f"there is no folder {target.parent}", hint="make it first")
    made = target.with_name(f".{target.name[:200]}-{secrets.token_hex(4)}")
    try:
        yield made
        with translated(target):
            umask = os.umask(0)
            os.umask(umask)
            made.chmod(0o666 & ~umask)
            made.rename(target)
            sync(target.parent)
    finally:
        made.unlink(missing_ok=True)
