"""What RUN --mount=type=cache keeps: volumes of the home, found again by their id.

Whoever has one holds a lock on its folder: a shared one, or one of its own where the mount asks for that. What nobody holds can be
cleared away; when it was last held is the folder's time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trivisor.core.errors import BuildFailed, CallerError, NotFound
from trivisor.core.paths import Home
from trivisor.images.upkeep import Share, weight
from trivisor.store.faults import translated
from trivisor.va.build.mounts import Mount, Sharing
from trivisor.va.build.needs import Maker
from trivisor.vmm import shares

if TYPE_CHECKING:
    from trivisor.vmm.manager import VMM
    from trivisor.vmm.volumes import StoredVolume

_NAME = re.compile(r"build-[0-9a-f]{24}(-\d+)?")
PATIENCE = 3600.0
"""Seconds that a step waits for another build to let go of a cache."""
_POLL = 0.05
_STRENGTH: tuple[Sharing, ...] = ("shared", "private", "locked")


@dataclass(frozen=True)
class Asker:
    """The step that wants caches: where it is written, the seconds that it may take, and what raises once its build has ended."""

    file: str
    line: int
    timeout: float | None
    check: Callable[[], None]


def hold(vmm: Maker, mounts: Sequence[Mount], asker: Asker, stack: ExitStack) -> dict[str, str]:
    """Return the volume of each cache, by the mount's id, held until `stack` ends. Raises BuildFailed if it was waited for too long."""
    wanted: dict[str, Mount] = {}
    for mount in mounts:
        wanted[mount.id] = max(wanted.get(mount.id, mount), mount, key=lambda one: _STRENGTH.index(one.sharing))
    # All take them in one order, so that no two wait for each other.
    return {cache: _take(Home(vmm.home), wanted[cache], asker, stack) for cache in sorted(wanted)}


def weigh(vmm: VMM) -> Share:
    """Return how many caches there are and what they take; those that a build has now cannot be freed."""
    sizes, free = [], 0
    for volume in _volumes(vmm):
        sizes.append(weight(volume.path))
        with _alone(volume.path) as alone:
            free += sizes[-1] if alone and not volume.machines else 0
    return Share(len(sizes), sum(sizes), free)


def prune(vmm: VMM, *, older: float = 0.0, dry_run: bool = False) -> int:
    """Remove the caches that no build or machine has, and none had for `older` seconds; return the bytes. Raises StorageError.

    With `dry_run` none is removed.
    """
    freed, limit = 0, time.time() - older
    for volume in _volumes(vmm):
        with _alone(volume.path) as alone:
            if alone and not volume.machines and volume.path.stat().st_mtime <= limit:
                size = weight(volume.path)
                with contextlib.suppress(NotFound, CallerError):
                    if not dry_run:
                        vmm.volumes.remove(volume.name)
                    freed += size
    return freed


def _volumes(vmm: VMM) -> list[StoredVolume]:
    return [volume for volume in vmm.volumes.list() if _NAME.fullmatch(volume.name)]


def _take(home: Home, mount: Mount, asker: Asker, stack: ExitStack) -> str:
    name = "build-" + hashlib.sha256(mount.id.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    end = time.monotonic() + (PATIENCE if asker.timeout is None else asker.timeout)
    number = 0
    while True:
        tried = f"{name}-{number}" if number else name
        path = shares.place(home, tried)
        if shares.make(home, tried):
            path.chmod(mount.mode)
            if (mount.uid or mount.gid) and os.geteuid() == 0:  # rootless it is the root's of the machine
                os.chown(path, mount.uid, mount.gid)
        held = _lock(path, fcntl.LOCK_SH if mount.sharing == "shared" else fcntl.LOCK_EX)
        if held is not None:
            stack.callback(os.close, held)
            with contextlib.suppress(PermissionError):  # rootless, a step may have given it to another id
                os.utime(path)
            return tried
        if mount.sharing == "private":
            number += 1
            continue
        if time.monotonic() > end:
            raise BuildFailed(asker.file, asker.line, f"another build has the cache {mount.id}, and did not let go of it")
        asker.check()
        time.sleep(_POLL)  # a wait inside flock(2) could neither be bounded nor interrupted


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody has the cache; nobody comes to have it meanwhile."""
    held = _lock(path, fcntl.LOCK_EX)
    try:
        yield held is not None
    finally:
        if held is not None:
            os.close(held)


def _lock(path: Path, how: int) -> int | None:
    """Return the folder's descriptor, which holds its lock; None if another has that, or the folder is gone. Raises StorageError."""
    with translated(path), ExitStack() as undo:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), path.stat()):  # cleared away, and another made
                return None
        except (BlockingIOError, FileNotFoundError):
            return None
        undo.pop_all()
        return fd
