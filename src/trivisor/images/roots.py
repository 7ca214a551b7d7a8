"""What is derived from images: made when first needed, from their layers, and shared by all machines; nobody writes to it.

    cache/trees/<name>/root             a folder that a machine's writable layer is laid over (container, gVisor)
    cache/roots/<name>/root.squashfs    a whole root for a virtual machine's disk

Each is whole or not there: made aside, synced, renamed. Whoever finds one being made waits for it. They lie in the cache, since
they can be made again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.launch import ids
from trivisor.store import workspace
from trivisor.store.faults import from_os, translated

WAIT = 1800.0
"""Seconds to wait for another process that makes the same."""


class Cache:
    """The derived things of one kind, each a folder."""

    def __init__(self, root: Path, tmp: Path) -> None:
        self._root = root
        self._tmp = tmp

    def path(self, name: str) -> Path:
        """Return where the folder called `name` is, or will be."""
        return self._root / name.replace(":", "-")

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder; if it is not there `make` fills a new one first. Raises StorageError, and what `make` raises."""
        path = self.path(name)
        if path.exists():
            return path
        with self._making(path):
            if not path.exists():
                self._make(path, make)
        return path

    def all(self, names: Sequence[str], make: Callable[[Path, list[str]], None]) -> list[Path]:
        """Return the folders of a chain; `make` is given a folder to make those in that are not there, by their `path` names.

        Raises StorageError, and what `make` raises.
        """
        paths = [self.path(name) for name in names]
        if all(path.exists() for path in paths):
            return paths
        with self._making(paths[-1]):
            missing = [name for name, path in zip(names, paths, strict=True) if not path.exists()]
            if missing:
                with workspace.workspace(self._tmp) as work, translated(self._root):
                    make(work.path, missing)
                    _sync(work.path)
                    for name in missing:
                        with contextlib.suppress(FileExistsError), _taken():
                            (work.path / self.path(name).name).rename(self.path(name))
        return paths

    def keep(self, needed: Callable[[], set[str]]) -> list[str]:
        """Remove the folders with other names than those, and return what was removed in words.

        `needed` is asked after looking which there are: what is made meanwhile is of no concern.
        """
        there = self._entries()
        names = {self.path(name).name for name in needed()} if there else set()
        said = []
        for entry in there:
            if entry.name.removesuffix(".lock") in names:
                continue
            if entry.name.endswith(".lock"):
                # Unlinked only while nobody makes that one: who waits on a file without a name would not exclude the next.
                with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(entry, 0):
                    entry.unlink(missing_ok=True)
            elif self._drop(entry):
                said.append(f"{self._root.name[:-1]} {entry.name[:19]}: removed, no image or machine names it")
        return said

    def drop(self, name: str) -> None:
        """Remove the folder called `name`, if there is one."""
        self._drop(self.path(name))

    def _drop(self, folder: Path) -> bool:
        if not folder.exists():
            return False
        with workspace.workspace(self._tmp) as aside, translated(self._root):
            try:
                folder.rename(aside.path / "dropped")
            except FileNotFoundError:
                return False  # another was first
            remove(aside.path / "dropped")
        return True

    def _entries(self) -> list[Path]:
        try:
            return sorted(self._root.iterdir())
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _making(self, path: Path) -> Iterator[None]:
        with translated(self._root):
            self._root.mkdir(mode=0o700, exist_ok=True)
        try:
            with _locked(path.with_name(path.name + ".lock"), WAIT):
                yield
        except BlockingIOError:
            raise StorageError(f"another process makes {path} for over {WAIT:g} s", hint="end that process") from None

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        with workspace.workspace(self._tmp) as work, translated(self._root):
            made = work.path / "made"
            made.mkdir(mode=0o700)
            make(made)
            _sync(made)
            made.rename(path)


@contextlib.contextmanager
def _taken() -> Iterator[None]:
    """Raise FileExistsError, in whichever words rename(2) says that another process made the same folder."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(error.errno, error.strerror) from error
        raise


def remove(tree: Path) -> None:
    """Remove a tree, with folders that even their owner may not write to, and with what belongs to subordinate ids."""
    try:
        for folder, _, _ in os.walk(tree):
            mode = os.lstat(folder).st_mode
            if mode & stat.S_IRWXU != stat.S_IRWXU and os.geteuid() != 0:
                Path(folder).chmod(stat.S_IMODE(mode) | stat.S_IRWXU)
        shutil.rmtree(tree)
    except PermissionError:
        ids.remove_tree(tree)


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[None]:
    """Hold flock(2) on `path`. Raises BlockingIOError after `wait` seconds."""
    deadline = time.monotonic() + wait
    while True:
        with open(path, "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                time.sleep(0.02)  # flock has no wait with a bound
            # The file may have been swept between open and lock.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    yield
                    return


def _sync(path: Path) -> None:
    """Bring all of its file system to the disk (syncfs(2)): a tree has too many files to sync each."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(folder):
            raise from_os(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())), path)
    finally:
        os.close(folder)
