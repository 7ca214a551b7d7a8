"""Trees on the wire (PROTOCOL.md, "tree"): packing a local one, unpacking one that a guest sent.

A guest's tree is hostile. Every name is checked, every folder is opened from its parent's descriptor without following
links, so nothing outside the destination is touched, whatever links the tree itself or somebody else put there. Files
are written aside and renamed, so what was there is replaced whole or not at all. Set-id bits are dropped: a guest must
not leave a set-user-id program on the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from trivisor.core.errors import GuestError, GuestProtocolError, StorageError
from trivisor.core.units import format_size

NO_OWNER = 0xFFFFFFFF
MAX_ENTRIES = 1_000_000
_CHUNK = 256 * 1024
_PATH_MAX = 4096
_NAME_MAX = 255
_META = struct.Struct("<IIIQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Progress = Callable[[int, int | None], object]
"""Told bytes of file content done, and the total where it is known."""


def check_name(path: bytes) -> None:
    """Raise GuestProtocolError unless `path` is relative and stays below where it starts; "" is the root itself."""
    if len(path) > _PATH_MAX or any(part in (b"", b".", b"..") or len(part) > _NAME_MAX for part in path.split(b"/") if path):
        raise GuestProtocolError(f"a tree holds the name {path[:100]!r}", hint="nothing outside the destination was touched")


# -- packing --------------------------------------------------------------------------------------


def pack(local: Path, *, owners: bool | tuple[int, int], progress: Progress | None = None) -> Iterator[bytes]:
    """Yield the tree at `local` (a file or folder, links followed only there) in pieces of about 256 KiB.

    `owners`: as they are, nobody's, or this uid and gid.

    Raises StorageError for what cannot be read.
    """
    try:
        yield from _Packer(owners, progress).tree(os.fsencode(local))
    except OSError as error:
        raise StorageError(f"cannot read {os.fsdecode(error.filename or local)}: {error.strerror}") from error


class _Packer:
    def __init__(self, owners: bool | tuple[int, int], progress: Progress | None) -> None:
        self._owners = (NO_OWNER, NO_OWNER) if owners is False else owners
        self._progress = progress
        self._buffer = bytearray()
        self._done = 0
        self._total: int | None = None

    def tree(self, local: bytes) -> Iterator[bytes]:
        status = os.stat(local)
        if stat.S_ISREG(status.st_mode):
            self._total = status.st_size
            yield from self._file(local, b"", os.O_RDONLY)
        elif stat.S_ISDIR(status.st_mode):
            self._record(b"d", b"", status)
            stack = [(local, b"")]
            while stack:
                yield from self._folder(*stack.pop(), stack)
        else:
            raise StorageError(f"{os.fsdecode(local)} is neither a file nor a folder")
        yield bytes(self._buffer) + b"e"

    def _folder(self, local: bytes, path: bytes, stack: list[tuple[bytes, bytes]]) -> Iterator[bytes]:
        with os.scandir(local) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                inner = path + b"/" + entry.name if path else entry.name
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    self._record(b"d", inner, status)
                    stack.append((entry.path, inner))
                elif stat.S_ISREG(status.st_mode):
                    yield from self._file(entry.path, inner, os.O_RDONLY | os.O_NOFOLLOW)
                elif stat.S_ISLNK(status.st_mode):
                    self._record(b"l", inner, status, _string(os.fsencode(Path(os.fsdecode(entry.path)).readlink())))
                if len(self._buffer) >= _CHUNK:
                    yield self._flush()

    def _file(self, local: bytes, path: bytes, flags: int) -> Iterator[bytes]:
        with open(os.open(local, flags | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            self._record(b"f", path, status, _U64.pack(status.st_size))
            left = status.st_size
            while left:
                part = file.read(min(left, _CHUNK))
                if not part:
                    raise StorageError(f"{os.fsdecode(local)} became shorter while it was read")
                left -= len(part)
                if len(part) < _CHUNK // 4:
                    self._buffer += part
                else:
                    if self._buffer:
                        yield self._flush()
                    yield part
                self._done += len(part)
                if self._progress is not None:
                    self._progress(self._done, self._total)
            if len(self._buffer) >= _CHUNK:
                yield self._flush()

    def _record(self, kind: bytes, path: bytes, status: os.stat_result, rest: bytes = b"") -> None:
        uid, gid = (status.st_uid, status.st_gid) if self._owners is True else self._owners
        mtime = max(0, status.st_mtime_ns)
        self._buffer += kind + _string(path) + _META.pack(stat.S_IMODE(status.st_mode), uid, gid, mtime) + rest

    def _flush(self) -> bytes:
        piece = bytes(self._buffer)
        self._buffer.clear()
        return piece


def _string(value: bytes) -> bytes:
    return _U32.pack(len(value)) + value


# -- unpacking ------------------------------------------------------------------------------------


class EndedEarly(Exception):
    """The stream ended before the tree did. Whoever runs the command knows why."""


class Source:
    """Reads a stream of unevenly cut pieces. `more()` gives the next, b"" at the end."""

    def __init__(self, more: Callable[[], bytes]) -> None:
        self._more = more
        self._piece = memoryview(b"")

    def some(self, most: int) -> memoryview:
        """Return at least one byte, at most `most`."""
        if not self._piece:
            self._piece = memoryview(self._more())
            if not self._piece:
                raise EndedEarly
        part, self._piece = self._piece[:most], self._piece[most:]
        return part

    def exact(self, size: int) -> bytes:
        part = self.some(size) if size else b""
        if len(part) == size:
            return bytes(part)
        parts, left = [part], size - len(part)
        while left:
            parts.append(self.some(left))
            left -= len(parts[-1])
        return b"".join(parts)

    def string(self) -> bytes:
        (size,) = _U32.unpack(self.exact(4))
        if size > _PATH_MAX:
            raise GuestProtocolError(f"a tree holds a name of {size} bytes")
        value = self.exact(size)
        if b"\0" in value:
            raise GuestProtocolError("a tree holds a name with a NUL")
        return value


@dataclass(frozen=True)
class _Record:
    kind: bytes
    path: bytes
    mode: int
    uid: int
    gid: int
    mtime: int


def _read_record(source: Source) -> _Record | None:
    kind = source.exact(1)
    if kind == b"e":
        return None
    if kind not in (b"d", b"f", b"l"):
        raise GuestProtocolError(f"a tree holds a record of kind {kind!r}")
    path = source.string()
    check_name(path)
    mode, uid, gid, mtime = _META.unpack(source.exact(_META.size))
    return _Record(kind, path, mode & 0o777, uid, gid, min(mtime, (1 << 63) - 1))


class Unpacker:
    """Makes the tree that `source` sends at `local`. A context manager.

    `owners` keeps uids and gids where the caller may (root). More than `limit` bytes of content is an error. What is
    there already is replaced, but a folder never by something else.
    """

    def __init__(self, source: Source, local: Path, *, owners: bool, limit: int, progress: Progress | None = None) -> None:
        self._source = source
        self._local = local.absolute()
        self._owners = owners and os.geteuid() == 0
        self._limit = limit
        self._progress = progress
        self._root = -1
        self._parent: tuple[bytes, int] = (b"", -1)
        self._folders: list[_Record] = []
        self._done = 0
        self._total: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._keep_parent(b"", -1)
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def run(self) -> None:
        """Unpack to the end of the tree. Raises GuestProtocolError, EndedEarly, or StorageError for the host's part."""
        try:
            count = 0
            while (record := _read_record(self._source)) is not None:
                count += 1
                if count > MAX_ENTRIES:
                    raise GuestError(f"the tree has more than {MAX_ENTRIES} entries", hint="download its parts one by one")
                self._make(record)
            self._finish_folders()
        except GuestError:
            raise  # some of them are OSErrors too
        except OSError as error:
            name = os.fsdecode(error.filename2 or error.filename or self._local)
            raise StorageError(f"cannot write {name} (under {self._local}): {error.strerror}", hint=_hint(error)) from error

    def _make(self, record: _Record) -> None:
        if not record.path:
            self._make_root(record)
            return
        if self._root < 0:
            raise GuestProtocolError("a tree does not begin with its root")
        parent, _, name = record.path.rpartition(b"/")
        self._place(self._folder(parent), name, record)

    def _make_root(self, record: _Record) -> None:
        if self._root >= 0 or self._done:
            raise GuestProtocolError("a tree has two roots")
        if record.kind == b"d":
            with contextlib.suppress(FileExistsError):
                self._local.mkdir(mode=0o700)
                self._folders.append(record)
            # The destination itself is the caller's word: a link to a folder there is followed.
            self._root = os.open(self._local, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            return
        folder = os.open(self._local.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._place(folder, os.fsencode(self._local.name), record, root=True)
        finally:
            os.close(folder)

    def _place(self, folder: int, name: bytes, record: _Record, *, root: bool = False) -> None:
        if record.kind == b"d":
            self._make_folder(folder, name, record)
        elif record.kind == b"f":
            self._make_file(folder, name, record, root)
        else:
            self._make_link(folder, name, record)

    def _make_folder(self, folder: int, name: bytes, record: _Record) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
                os.mkdir(name, 0o700, dir_fd=folder)
        self._folders.append(record)

    def _make_file(self, folder: int, name: bytes, record: _Record, root: bool) -> None:
        (size,) = _U64.unpack(self._source.exact(8))
        if self._done + size > self._limit:
            raise GuestError(f"the tree holds more than {format_size(self._limit)}", hint="raise max_size, or download its parts")
        if root:
            self._total = size
        aside = _aside()
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            try:
                self._copy(fd, size)
                if self._owners:
                    os.fchown(fd, _id(record.uid), _id(record.gid))
                os.fchmod(fd, record.mode)
                os.utime(fd, ns=(record.mtime, record.mtime))
            finally:
                os.close(fd)
            os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(aside, dir_fd=folder)
            raise

    def _copy(self, fd: int, size: int) -> None:
        while size:
            part = self._source.some(size)
            size -= len(part)
            self._done += len(part)
            while part:
                part = part[os.write(fd, part) :]
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _make_link(self, folder: int, name: bytes, record: _Record) -> None:
        target = self._source.string()
        if not target:
            raise GuestProtocolError("a tree holds a link to nothing")
        aside = _aside()
        os.symlink(target, aside, dir_fd=folder)
        try:
            if self._owners:
                os.chown(aside, _id(record.uid), _id(record.gid), dir_fd=folder, follow_symlinks=False)
            os.utime(aside, ns=(record.mtime, record.mtime), dir_fd=folder, follow_symlinks=False)
            os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(aside, dir_fd=folder)
            raise

    def _finish_folders(self) -> None:
        """Modes and times of folders come last: filling a folder needs the one and changes the other."""
        for record in reversed(self._folders):
            fd = os.dup(self._folder(record.path))
            try:
                if self._owners:
                    os.fchown(fd, _id(record.uid), _id(record.gid))
                os.utime(fd, ns=(record.mtime, record.mtime))
                os.fchmod(fd, record.mode)
            finally:
                os.close(fd)

    def _folder(self, path: bytes) -> int:
        """Return a descriptor of the folder `path`, opened step by step; it stays ours until the next call."""
        if not path:
            return self._root
        if self._parent[0] != path:
            self._keep_parent(path, self._descend(path))
        return self._parent[1]

    def _descend(self, path: bytes) -> int:
        fd = os.dup(self._root)
        for part in path.split(b"/"):
            try:
                inner = os.open(part, _FOLDER, dir_fd=fd)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise GuestProtocolError(f"a tree has {path[:100]!r} used as a folder, which it is not") from error
                raise
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _keep_parent(self, path: bytes, fd: int) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = (path, fd)


def _hint(error: OSError) -> str:
    return "free some space on the host" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def _aside() -> bytes:
    return b".trivisor-" + secrets.token_hex(8).encode()


def _id(number: int) -> int:
    return -1 if number == NO_OWNER else number
