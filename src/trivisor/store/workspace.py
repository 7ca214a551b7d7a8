"""Folders for half-made things: named after their maker, locked by it, swept when it is dead.

A workspace is `PID-STARTTIME-RANDOM` under tmp/, held by flock(2) on the folder itself. It is also a lease:
blobs pinned by its `owner` stay for as long as the folder is there, which covers the time between adding
a blob and naming it. Its maker is dead if nobody holds the lock *and* no such process is seen: the lock
is right across pid namespaces, the name across the instant between making and locking.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.process import start_time
from trivisor.store.faults import translated

LEASE = "lease:"
_NAME = re.compile(r"(\d{1,10})-(\d{1,20})-[0-9a-f]+")


@dataclass(frozen=True)
class Workspace:
    """A folder of one's own on the store's file system."""

    path: Path

    @property
    def owner(self) -> str:
        """The owner that pins blobs for as long as the workspace is there."""
        return LEASE + self.path.name


@contextmanager
def workspace(tmp: Path) -> Iterator[Workspace]:
    """Make a workspace under `tmp` and remove it with all that is in it at the end. Raises StorageError."""
    path = tmp / f"{os.getpid()}-{start_time(os.getpid())}-{secrets.token_hex(6)}"
    with translated(tmp):
        path.mkdir(mode=0o700)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Workspace(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def leased(tmp: Path, owner: str) -> bool:
    """Tell whether the workspace that `owner` names is still there."""
    return owner.startswith(LEASE) and (tmp / owner.removeprefix(LEASE)).is_dir()


def sweep(tmp: Path) -> list[str]:
    """Remove the workspaces of dead makers and return their names. Anything else is left alone."""
    removed = []
    for path in sorted(tmp.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is None or start_time(int(match[1])) == int(match[2]):
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another sweep was first
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
        except BlockingIOError:
            continue  # its maker lives, in another pid namespace
        finally:
            os.close(lock)
    return removed
