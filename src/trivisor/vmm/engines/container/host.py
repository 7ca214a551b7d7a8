"""What a container takes of the host beside its ids: layers on its disk, volumes, resolvers, what confines it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.spec import Spec
from trivisor.launch.jail import Bind, probe

_PROFILE = "docker-default"
"""Docker's AppArmor profile. It is Docker's to load: a profile of our own would need root to install."""
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_PROCESSORS = Path("/sys/devices/system/cpu")
_NAMESERVER = re.compile(r"nameserver\s+([0-9a-fA-F.:]+)\s*")


def make_layer(folder: Path, like: Path | None, owner: tuple[int, int]) -> None:
    """Make the folders of a writable layer, which root of the machine owns. Raises StorageError."""
    try:
        folder.mkdir(mode=0o755, parents=True)
        for name, mode in (("upper", 0o755), ("work", 0o700)):
            place = folder / name
            place.mkdir(mode=mode)
            place.chmod(like.stat().st_mode & 0o7777 if like and name == "upper" else mode)
            if owner != (os.geteuid(), os.getegid()):
                os.chown(place, *owner)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}", hint="free space under the home") from error


def volumes(spec: Spec) -> list[Bind]:
    """Return the host's folders that the machine shares. Programs in them can be run; no device in them works."""
    return [Bind(Path(volume.source), target, "ro,exec" if volume.readonly else "rw,exec") for target, volume in spec.volumes.items()]


def resolvers() -> list[str]:
    """Return the host's DNS servers (resolv.conf(5))."""
    try:
        lines = Path("/etc/resolv.conf").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [match[1] for line in lines if (match := _NAMESERVER.fullmatch(line.strip()))][:3]


@functools.cache
def hidden() -> tuple[str, ...]:
    """Return what to mask that has a place for each processor: how hot it is tells what others do."""
    return tuple(sorted(str(path) for path in _PROCESSORS.glob("cpu[0-9]*/thermal_throttle")))


@functools.cache
def apparmor() -> str:
    """Return the AppArmor profile to use, "" for none."""
    try:
        if _APPARMOR.read_text().strip() == "Y" and any(line.startswith(f"{_PROFILE} ") for line in _PROFILES.read_text().splitlines()):
            return _PROFILE
    except OSError:  # this kernel has no AppArmor, or we may not see its profiles
        pass
    return ""


def _apparmor_lacks() -> Iterator[str]:
    try:
        on = _APPARMOR.read_text().strip() == "Y"
    except OSError:
        return
    if on and not apparmor():
        yield f"AppArmor, which is on, but has no profile {_PROFILE} loaded"


def lacks() -> list[str]:
    """Return what would confine a container more and is not there, in words."""
    return [*([] if probe().landlock >= 2 else ["Landlock"]), *_apparmor_lacks()]


def confinement() -> dict[str, str]:
    """Return what confines a container on this host, for doctor."""
    landlock = probe().landlock
    has = ["seccomp", "capabilities as Docker's", *([f"Landlock (ABI {landlock})"] if landlock >= 2 else [])]
    if apparmor():
        has.append(f"AppArmor ({apparmor()})")
    return {"confined by": ", ".join(has) + (f"; lacks {', '.join(lacks())}" if lacks() else "")}
