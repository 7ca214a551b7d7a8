"""Running other programs, and telling whether a process is still the one we knew."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trivisor.core.errors import EngineError, HostLacks

TAIL = 4000


def find(program: str, package: str) -> str:
    """Return the path of `program`. Raises HostLacks naming the Debian `package` that carries it."""
    extra = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    path = shutil.which(program, path=extra)
    if path is None:
        raise HostLacks(f"{program} is not installed", hint=f"apt-get install {package}")
    return path


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    input: bytes | None = None,  # noqa: A002 - subprocess's name for it
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    fds: Sequence[int] = (),
) -> bytes:
    """Run `argv` to its end, with the descriptors `fds`, and return its standard output. Raises EngineError with the last output."""
    command = [str(word) for word in argv]
    try:
        done = subprocess.run(
            command,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
            env=env,
            cwd=cwd,
            pass_fds=fds,
            check=False,
        )
    except FileNotFoundError as error:
        raise EngineError(f"{command[0]} cannot be run", command=command, output=str(error)) from error
    except subprocess.TimeoutExpired as error:
        output = (error.stderr or b"").decode(errors="replace")[-TAIL:]
        raise EngineError(f"{command[0]} took over {timeout:g} s", command=command, output=output) from error
    if done.returncode:
        output = (done.stderr or done.stdout).decode(errors="replace")[-TAIL:]
        raise EngineError(f"{command[0]} failed ({done.returncode})", command=command, status=done.returncode, output=output)
    return done.stdout


def glance(path: str | os.PathLike[str], most: int = 1 << 16) -> bytes:
    """Return what one read(2) of a file gives, at most `most` bytes: all of a small one, or of one of /proc. Raises OSError.

    A life reads some thirty such files, and open() asks the kernel four more questions of each.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def start_time(pid: int) -> int | None:
    """Return when `pid` started (clock ticks since boot, proc(5) field 22), or None if it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def running(pid: int, start: int) -> bool:
    """Return whether the process that started then still runs (a zombie has ended)."""
    fields = _stat(pid)
    return bool(fields) and int(fields[19]) == start and fields[0] not in (b"Z", b"X")


def _stat(pid: int) -> list[bytes]:
    """Return the fields of proc(5) from the third on, none for a process that is gone."""
    try:
        return glance(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return []


@functools.cache
def boot_id() -> str:
    """Return the host's boot id (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


_own: list[int] = []
_hooked: list[bool] = []


def _own_start() -> int:
    """Return when this process started; asked once, and again in a forked child."""
    if not _hooked:
        _hooked.append(True)
        os.register_at_fork(after_in_child=_own.clear)
    start = next(iter(_own), None)
    if start is None:
        start = start_time(os.getpid()) or 0
        _own[:] = [start]
    return start


@dataclass(frozen=True)
class Who:
    """One process, told apart from a later one that has the same pid by when it started."""

    pid: int
    start: int

    @classmethod
    def me(cls) -> Self:
        """Return this process (not its parent's, after a fork)."""
        return cls(os.getpid(), _own_start())

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return what `str()` of a Who, "PID START", says; None for anything else."""
        words = text.split()
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            return None
        return cls(int(words[0]), int(words[1]))

    def alive(self) -> bool:
        """Return whether that very process still runs (a zombie has ended)."""
        if self.pid == os.getpid() and self.start == _own_start():
            return True
        return running(self.pid, self.start)

    def __str__(self) -> str:
        return f"{self.pid} {self.start}"
