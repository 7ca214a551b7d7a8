"""A blob on its way into the store: one file by its digest, kept when a pull is interrupted, claimed by one at a time.

    store/tmp/partial/<hex>     flock(2) by whoever writes it

The lock is on the file, so it goes with its holder, however that ends; who comes next goes on where the file ends. What is
there is hashed again before it is added to: after a power cut the length may be right and the content not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.store.faults import from_os, translated
from trivisor.store.store import Store

_READ = 1 << 20
WEEK = 7 * 86400.0
"""Seconds for which a piece that nobody goes on with is kept."""


class Partial:
    """The claimed file: `position` bytes are there, hashed."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path = path
        self.position = 0
        self.resumed = False
        self._fd = fd
        self._sha = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of what is there."""
        return f"sha256:{self._sha.hexdigest()}"

    def load(self, size: int) -> None:
        """Take what an earlier pull left, unless it is more than `size`."""
        with translated(self.path):
            if os.fstat(self._fd).st_size > size:
                os.ftruncate(self._fd, 0)
            while data := os.pread(self._fd, _READ, self.position):
                self._sha.update(data)
                self.position += len(data)
        self.resumed = self.position > 0

    def write(self, data: bytes) -> None:
        """Append. Raises StorageError; a full disk gets back what the file had."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._fd, view, self.position)
                self._sha.update(view[:written])
                self.position += written
                view = view[written:]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.drop()
            raise from_os(error, self.path) from error

    def reset(self) -> None:
        """Begin again from nothing."""
        with translated(self.path):
            os.ftruncate(self._fd, 0)
        self.position, self.resumed, self._sha = 0, False, hashlib.sha256()

    def drop(self) -> None:
        """Remove the file: it is in the store, or of no use."""
        self.path.unlink(missing_ok=True)


@contextmanager
def claim(store: Store, digest: str) -> Iterator[Partial | None]:
    """Claim the piece of `digest`; None if another has it, or just finished it: look into the store, and come again."""
    path = piece(store, digest)
    with translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield Partial(fd, path) if _locked(fd, path) else None
    finally:
        os.close(fd)


def tidy(store: Store, age: float = WEEK, *, dry_run: bool = False) -> int:
    """Remove pieces that nobody has gone on with for `age` seconds. Return the bytes freed; with `dry_run` those that would be."""
    freed = 0
    for path in sorted(folder(store).glob("*")):
        with translated(path):
            try:
                if time.time() - path.stat().st_mtime < age:
                    continue
                with claim(store, f"sha256:{path.name}") as partial:
                    if partial is not None:
                        freed += path.stat().st_size
                        if not dry_run:
                            partial.drop()
            except FileNotFoundError:
                continue  # another was first
    return freed


def room(store: Store, wanted: int) -> None:
    """Raise StorageError if the disk has no room for `wanted` more bytes: before the first is fetched."""
    with translated(store.root):
        found = os.statvfs(store.root)
    free = found.f_bavail * found.f_frsize
    if free < wanted:
        hint = "free some space (`trivisor images rm`), or set TRIVISOR_HOME to a folder on a larger disk"
        raise StorageError(f"{store.root}: the image needs {wanted} more bytes, and {free} are free", hint=hint)


def kept(store: Store, digests: Iterable[str]) -> int:
    """Return how many bytes of these blobs earlier pulls left."""
    found = 0
    for digest in digests:
        with contextlib.suppress(FileNotFoundError):
            found += piece(store, digest).stat().st_size
    return found


def folder(store: Store) -> Path:
    """Return where the pieces are."""
    return store.root / "tmp" / "partial"


def piece(store: Store, digest: str) -> Path:
    """Return where the piece of `digest` is, if there is one."""
    return folder(store) / digest.partition(":")[2]


def _locked(fd: int, path: Path) -> bool:
    with translated(path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(fd), path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False  # FileNotFoundError: finished, and renamed into the store
