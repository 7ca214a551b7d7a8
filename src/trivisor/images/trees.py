"""Unpacked roots: what the container and gvisor walls lay a machine's writable layer over.

Made when first needed, from the image's squashfs, and shared by all machines of the image; nobody writes to one. They
lie in the cache, since they can be made again, each whole or not at all: unpacked aside, synced, renamed. Whoever
finds one being made waits for it.

Only root can give files to others. Without root everything belongs to the caller, setuid and setgid bits and file capabilities
are gone; `lost` says so. `image="host"` has a tree of its own kind (host.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trivisor.core import process
from trivisor.core.errors import StorageError
from trivisor.core.paths import Home
from trivisor.images import host
from trivisor.images.build import Progress
from trivisor.store import workspace
from trivisor.store.faults import from_os, translated

UNPACK_TIMEOUT = 1800.0
WAIT = 1800.0
"""Seconds to wait for another process that unpacks the same root."""
LOST = "without root: owners, setuid bits and file capabilities of the image are lost"


class Trees:
    """The unpacked roots of one home."""

    def __init__(self, home: Home) -> None:
        self._root = home.cache / "trees"
        self._tmp = home.tmp

    def path(self, digest: str) -> Path:
        """Return where the root with this digest is, or will be."""
        return self._folder(digest) / "root"

    def lost(self, digest: str) -> str:
        """Say what the root lacks of the image, "" if nothing."""
        return LOST if (self._folder(digest) / "lost").exists() else ""

    def get(self, digest: str, squashfs: Callable[[], Path], progress: Progress) -> Path:
        """Return the root, made if it is not there. Raises HostLacks, EngineError, StorageError."""
        path = self.path(digest)
        if path.exists():
            return path
        with self._making(digest):
            if not path.exists():
                self._make(digest, squashfs, progress)
        return path

    def keep(self, needed: Callable[[], set[str]]) -> list[str]:
        """Remove the roots with other digests than those, and return what was removed in words.

        `needed` is asked after looking which roots there are: what is made meanwhile is of no concern.
        """
        there = self._entries()
        names = {self._folder(digest).name for digest in needed()} if there else set()
        said = []
        for entry in there:
            if entry.name.removesuffix(".lock") in names:
                continue
            if entry.name.endswith(".lock"):
                # Unlinked only while nobody makes that root: who waits on a file without a name would not exclude the next.
                with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(entry, 0):
                    entry.unlink(missing_ok=True)
            elif self._drop(entry):
                said.append(f"tree {entry.name[:19]}: removed, no image or machine names it")
        return said

    def drop(self, digest: str) -> None:
        """Remove the root with this digest, if there is one."""
        self._drop(self._folder(digest))

    def _drop(self, folder: Path) -> bool:
        with workspace.workspace(self._tmp) as aside, translated(self._root):
            try:
                folder.rename(aside.path / "tree")
            except FileNotFoundError:
                return False  # another was first
            remove(aside.path / "tree")
        return True

    def _entries(self) -> list[Path]:
        try:
            return sorted(self._root.iterdir())
        except FileNotFoundError:
            return []

    def _folder(self, digest: str) -> Path:
        return self._root / digest.replace(":", "-")

    @contextlib.contextmanager
    def _making(self, digest: str) -> Iterator[None]:
        folder = self._folder(digest)
        with translated(self._root):
            self._root.mkdir(mode=0o700, exist_ok=True)
        try:
            with _locked(folder.with_name(folder.name + ".lock"), WAIT):
                yield
        except BlockingIOError:
            raise StorageError(f"another process unpacks {digest} for over {WAIT:g} s", hint="end that process") from None

    def _make(self, digest: str, squashfs: Callable[[], Path], progress: Progress) -> None:
        with workspace.workspace(self._tmp) as work, translated(self._root):
            made = work.path / "made"
            made.mkdir(mode=0o700)
            if digest.startswith(host.PREFIX):
                host.build(made / "root")
            else:
                progress("unpacking the image")
                _unpack(squashfs(), made / "root")
                if os.geteuid() != 0:
                    (made / "lost").write_text(LOST + "\n")
            _sync(made)
            made.rename(self._folder(digest))


def remove(tree: Path) -> None:
    """Remove a tree, with folders that even their owner may not write to."""
    for folder, _, _ in os.walk(tree):
        mode = os.lstat(folder).st_mode
        if mode & stat.S_IRWXU != stat.S_IRWXU and os.geteuid() != 0:
            Path(folder).chmod(stat.S_IMODE(mode) | stat.S_IRWXU)
    shutil.rmtree(tree)


def _unpack(squashfs: Path, target: Path) -> None:
    argv = [process.find("unsquashfs", "squashfs-tools"), "-no-progress", "-quiet", "-dest", str(target)]
    if os.geteuid() != 0:
        argv.append("-user-xattrs")  # the others are root's to give, and refused they make it fail
    process.run([*argv, squashfs], timeout=UNPACK_TIMEOUT)


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
