"""Making files that are whole or not there, once, whoever else makes them at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.files import sync
from trivisor.core.paths import Home
from trivisor.core.process import start_time

_COPY = 1 << 20
_ROOM = 1 << 20
"""Bytes; with less free than this a disk is full."""


class Held(EngineError):
    """Another process holds the lock, and went on holding it."""


@contextlib.contextmanager
def workspace(home: Home, what: str) -> Iterator[Path]:
    """A folder of this process under home.tmp, gone at the end unless it was renamed. The sweep knows its name."""
    pid = os.getpid()
    folder = home.tmp / f"{pid}-{start_time(pid)}-{what}-{os.urandom(4).hex()}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    except OSError as error:
        raise storage(error, f"making {what}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def storage(error: OSError, doing: str) -> StorageError:
    """Translate an OSError of the home's file system."""
    hint = "free some space, or set TRIVISOR_HOME to a larger disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StorageError(f"{doing} failed: {error.strerror or error}", hint=hint)


def check_room(folder: Path, doing: str, failure: Exception) -> None:
    """Raise StorageError because of `failure` if the file system of `folder` is full."""
    facts = os.statvfs(folder)
    if facts.f_bavail * facts.f_frsize < _ROOM:
        raise storage(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), doing) from failure


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object], *, timeout: float, shared: bool = False) -> Iterator[None]:
    """Hold flock(path). `waiting` is called once if someone else holds it. Raises Held after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    told = False
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage(error, f"locking {path.name}") from error
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _names(path, fd):
                break
        except BlockingIOError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() >= deadline:
            raise Held(f"another process has held {path.name} for {timeout:g} s", hint="see what it does, or end it")
        if not told:
            waiting()
            told = True
        # flock has no bounded wait of its own; 10 ms is nothing beside what is waited for.
        time.sleep(0.01)
    try:
        yield
    finally:
        os.close(fd)


def _names(path: Path, fd: int) -> bool:
    """Whether `path` is still the file that was opened: a sweep may have removed it meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def settle(folder: Path, target: Path) -> None:
    """Make `folder` durable and rename it to `target`, which must not exist."""
    for path in (*folder.iterdir(), folder):
        if path.is_file() or path.is_dir():
            sync(path)
    folder.rename(target)
    sync(target.parent)


def copy_sparse(source: int, target: int) -> int:
    """Copy the data of `source` and leave its holes; return the bytes copied. Blocks are shared where the file system can."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = copied = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        at = os.lseek(source, start, os.SEEK_HOLE)
        copy_range(source, target, start, at)
        copied += at - start
    return copied


def copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            done = os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            # Between file systems (EXDEV: before Linux 5.19 and for a memfd) and where it is not known.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            os.lseek(target, start, os.SEEK_SET)
            done = os.sendfile(target, source, start, min(end - start, _COPY))
        if done == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += done


def copy_file(source: Path, target: Path) -> None:
    """Copy one sparse file; `target` must not exist."""
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_sparse(reading, writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
