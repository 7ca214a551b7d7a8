"""What machines share with the host, from wish to folder.

A named volume is a folder of the home, made when it is first named (volumes.py keeps them). A folder of the host is looked
at once, when the machine is made: where it really is goes into the spec, and no part of that path may be a link ever after.
So nobody who may write beside it, a machine that shares the folder above least of all, can have the next start share
something else. Engines bind it by the flag `straight` (PROTOCOL.md), so the kernel holds to that too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from trivisor.core.errors import InvalidSpec, StorageError
from trivisor.core.paths import Home
from trivisor.core.wishes import Volume

_NEVER = ("/proc", "/sys", "/dev")
_MODE = 0o755


def place(home: Home, name: str) -> Path:
    """Return the folder of a named volume."""
    return home.volumes / name


def make(home: Home, name: str) -> bool:
    """Make a named volume; return whether it was not there before. Raises StorageError."""
    path = place(home, name)
    try:
        home.volumes.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=_MODE)
        path.chmod(_MODE)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}", hint="free space under the home") from error
    return True


def settle(home: Home, wishes: Mapping[str, Volume]) -> dict[str, Volume]:
    """Return `wishes` with each folder of the host by its real path. Raises InvalidSpec for what cannot be shared."""
    return {target: wish if wish.named else Volume(str(_real(home, wish.source)), wish.readonly) for target, wish in wishes.items()}


def prepare(home: Home, wishes: Mapping[str, Volume]) -> None:
    """Make the named volumes that are not there yet, and look at the folders. Raises StorageError."""
    for wish in wishes.values():
        if wish.named:
            make(home, wish.source)
    for found in folders(home, wishes).values():
        _look(Path(found.source))


def folders(home: Home, wishes: Mapping[str, Volume]) -> dict[str, Volume]:
    """Return `wishes` with each named volume by its folder, as engines are told of them."""
    if not wishes:
        return {}
    real = Home(Path(os.path.realpath(home.root)))  # no part of the path may be a link
    return {target: Volume(str(place(real, wish.source)), wish.readonly) if wish.named else wish for target, wish in wishes.items()}


def _real(home: Home, source: str) -> Path:
    try:
        real = Path(source).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidSpec(f"{source} cannot be shared: there is no such folder", hint="make it first") from error
    own = home.root.resolve()
    if not real.is_dir():
        raise InvalidSpec(f"{source} cannot be shared: it is no folder", hint="share the folder that it is in")
    if real == own or own in real.parents or real in own.parents:
        raise InvalidSpec(f"{source} cannot be shared: Trivisor's home {home.root} is in it, or it in there", hint="share another folder")
    if any(str(real) == never or str(real).startswith(never + "/") for never in _NEVER):
        raise InvalidSpec(f"{source} cannot be shared: it is the kernel's", hint="share a folder of files")
    return real


def _look(path: Path) -> None:
    """Open a folder part by part, following no link. Raises StorageError if it is not what it was."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open("/", flags)
    try:
        for part in path.parts[1:]:
            below = os.open(part, flags, dir_fd=at)
            os.close(at)
            at = below
            if not stat.S_ISDIR(os.fstat(at).st_mode):
                raise StorageError(f"the shared folder {path} leads through {part}, which is a link or a file now", hint="put it back")
    except OSError as error:
        raise StorageError(f"the shared folder {path} is gone: {error.strerror}", hint="put it back, or make a new machine") from error
    finally:
        os.close(at)
