"""Files in a machine. Each call is one of the guest's builtins, run as `user`; relative paths begin at that user's home.

What fails in the machine raises FileError, an OSError with the guest's errno: `error.errno == errno.ENOENT`. What fails
on the host's side of an upload or download raises NotFound or StorageError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from trivisor.core.errors import ExecTimeout, FileError, GuestError, GuestProtocolError, NotFound, WaitTimeout
from trivisor.vos import wire
from trivisor.vos.process import Process
from trivisor.vos.processes import MAX_OUTPUT, ExecResult, Processes
from trivisor.vos.tree import EndedEarly, Progress, Source, Unpacker, check_name, pack

FileType = Literal["file", "folder", "link", "other"]
MAX_DOWNLOAD = 1 << 40
"""Bytes of content in one download unless told otherwise."""
_LIST_MAX = 64 << 20
_PIECE = 1 << 20
_MINUTE = 60.0


@dataclass(frozen=True)
class FileInfo:
    """What stat(2) says. `mode` is the permission bits, `mtime` seconds since the epoch, `target` where a link points."""

    type: FileType
    mode: int
    size: int
    uid: int
    gid: int
    mtime: float
    target: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """One name in a folder. `info` is about the entry itself: links are not followed."""

    name: str
    info: FileInfo


class Files:
    """The files of one machine, as `user` may touch them (root unless given). Thread-safe.

    Calls that move no content give up after `timeout` seconds (ExecTimeout).
    """

    def __init__(self, processes: Processes, user: str = "", timeout: float = _MINUTE) -> None:
        self._processes = processes
        self._user = user
        self._timeout = timeout

    # -- content ----------------------------------------------------------------------------------

    def read(
        self, path: str, offset: int = 0, length: int | None = None, *, max_size: int = MAX_OUTPUT, timeout: float | None = None
    ) -> bytes:
        """Return the content of `path`, or `length` bytes from `offset`. More than `max_size` bytes is a GuestError."""
        limit = max_size if length is None else min(length, max_size)
        words = ["read", path, str(offset), str(-1 if length is None else length)]
        hint = "give offset and length, raise max_size, or download it"
        return self._run(words, path, timeout=timeout, limit=limit, hint=hint).stdout

    def read_text(self, path: str, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the content of `path` as text."""
        return self.read(path).decode(encoding, errors)

    def write(
        self,
        path: str,
        data: bytes | str | IO[bytes],
        *,
        mode: int = 0o644,
        append: bool = False,
        exclusive: bool = False,
        parents: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Write `data` (bytes, text as UTF-8, or a binary file) to `path`.

        `mode` is for a new file. `append` keeps what is there, `exclusive` raises FileError (EEXIST) if anything is,
        `parents` makes missing folders.
        """
        flags = "a" * append + "x" * exclusive + "p" * parents
        self._run(["write", path, f"{mode:o}", flags or "-"], path, stdin=data, timeout=timeout)

    def write_text(self, path: str, text: str, encoding: str = "utf-8") -> None:
        """Write `text` to `path`."""
        self.write(path, text.encode(encoding))

    # -- names ------------------------------------------------------------------------------------

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """Say what `path` is; with `follow=False` a link itself."""
        reader = wire.Reader(self._short(["stat" if follow else "lstat", path], path).stdout)
        info = _info(wire.parse_stat(reader))
        reader.done()
        return info

    def exists(self, path: str) -> bool:
        """Say whether `path` leads to anything."""
        try:
            self.stat(path)
        except FileError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    def list(self, path: str = "") -> list[FileEntry]:
        """Return what is in the folder `path`, sorted by name."""
        reader = wire.Reader(self._short(["list", path or "."], path or ".").stdout)
        entries = []
        while reader.left:
            name = reader.string()
            check_name(name)
            if not name or b"/" in name:
                raise GuestProtocolError(f"a folder holds the name {name[:100]!r}", machine=self._processes.machine)
            entries.append(FileEntry(wire.text(name), _info(wire.parse_stat(reader))))
        return sorted(entries, key=lambda entry: entry.name)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link or an empty folder; with `recursive` a folder and all in it."""
        self._run(["remove", path, "r" if recursive else "-"], path, timeout=None if recursive else self._timeout)

    def rename(self, source: str, target: str) -> None:
        """Rename `source` to `target`, replacing it (rename(2))."""
        self._short(["rename", source, target], source)

    def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Make a folder; with `parents` those above too, and it may exist."""
        self._short(["mkdir", path, f"{mode:o}", "p" if parents else "-"], path)

    def symlink(self, target: str, path: str) -> None:
        """Make `path` a symbolic link to `target`."""
        self._short(["symlink", target, path], path)

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits of `path`."""
        self._short(["chmod", path, f"{mode:o}"], path)

    # -- trees ------------------------------------------------------------------------------------

    def upload(
        self,
        local: str | os.PathLike[str],
        remote: str,
        *,
        owners: bool | tuple[int, int] = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> None:
        """Copy the file or folder `local` to `remote`, which is the new name itself; a folder that exists is merged into.

        Modes, times and symbolic links are kept, other kinds of file left out; owners are kept with `owners`, or all
        belongs to the uid and gid that it is, else to the user. `progress` is called with bytes done and the total, if known.
        """
        path = Path(local)
        if not path.exists():
            raise NotFound(f"{path} does not exist on the host")
        with self._transfer(["put", remote], timeout, stdin=True) as (process, deadline):
            try:
                for piece in pack(path, owners=owners, progress=progress):
                    process.stdin.write(piece, _left(deadline))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it ended before its time; its exit status says why
            self._check_end(process, remote, deadline)

    def download(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        owners: bool = False,
        progress: Progress | None = None,
        max_size: int = MAX_DOWNLOAD,
        timeout: float | None = None,
    ) -> None:
        """Copy the file or folder `remote` to `local`, which is the new name itself; a folder that exists is merged into.

        Nothing outside `local` is touched, whatever the machine sends. Modes (without set-id bits), times and symbolic
        links are kept, owners with `owners` where the caller is root. More than `max_size` bytes is a GuestError.
        """
        with self._transfer(["get", remote], timeout) as (process, deadline):
            source = Source(lambda: process.stdout.read(_PIECE, _left(deadline)))
            with Unpacker(source, Path(local), owners=owners, limit=max_size, progress=progress) as unpacker:
                try:
                    unpacker.run()
                except EndedEarly:
                    self._check_end(process, remote, deadline)
                    raise GuestProtocolError(f"the tree of {remote} ended early", machine=self._processes.machine) from None
                except GuestError as error:
                    error.machine = error.machine or self._processes.machine
                    raise
            self._check_end(process, remote, deadline)

    # -- running builtins -------------------------------------------------------------------------

    def _short(self, words: Sequence[str], path: str) -> ExecResult:
        return self._run(words, path, timeout=self._timeout, limit=_LIST_MAX)

    def _run(
        self,
        words: Sequence[str],
        path: str,
        *,
        stdin: bytes | str | IO[bytes] = b"",
        timeout: float | None = None,
        limit: int = MAX_OUTPUT,
        hint: str = "",
    ) -> ExecResult:
        result = self._processes.run_builtin(words, user=self._user, stdin=stdin, timeout=timeout, limit=limit, hint=hint)
        self._check(result.signal, result.exit_code, path)
        return result

    @contextlib.contextmanager
    def _transfer(self, words: Sequence[str], timeout: float | None, *, stdin: bool = False) -> Iterator[tuple[Process, float | None]]:
        """A builtin that moves a tree, killed if the block fails, and its deadline. Raises ExecTimeout."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with self._processes.builtin(words, user=self._user, stdin=stdin) as process:
                yield process, deadline
        except WaitTimeout as error:
            raise ExecTimeout(self._processes.machine, timeout or 0.0) from error

    def _check(self, signal: int | None, code: int, path: str) -> None:
        if signal is not None:
            raise GuestError(f"{path}: signal {signal} ended the file operation", machine=self._processes.machine)
        if code:
            raise FileError(code, path, machine=self._processes.machine)

    def _check_end(self, process: Process, remote: str, deadline: float | None) -> None:
        """Wait for the end of put or get. What failed below `remote` is named by its first line on stderr."""
        if code := process.wait(_left(deadline)):
            said = process.stderr.read(4096, _left(deadline)).decode("utf-8", "replace").partition("\n")[0].rpartition(": ")[0]
            self._check(process.signal, code, f"{remote.rstrip('/')}/{said}" if said and said != remote.rstrip("/") else remote)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _info(record: wire.Stat) -> FileInfo:
    kind: FileType = "other"
    if stat.S_ISREG(record.mode):
        kind = "file"
    elif stat.S_ISDIR(record.mode):
        kind = "folder"
    elif stat.S_ISLNK(record.mode):
        kind = "link"
    target = wire.text(record.target) if kind == "link" else None
    return FileInfo(kind, stat.S_IMODE(record.mode), record.size, record.uid, record.gid, record.mtime / 1e9, target)
