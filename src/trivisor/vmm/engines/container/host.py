"""What a container takes of the host beside its ids and layers: what confines it, what it takes where nothing counts."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.paths import MachineDir
from trivisor.launch.jail import probe
from trivisor.vmm.engine import Usage

_PAGE, _TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
_PROFILE = "docker-default"
"""Docker's AppArmor profile. It is Docker's to load: a profile of our own would need root to install."""
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_PROCESSORS = Path("/sys/devices/system/cpu")


def usage(place: MachineDir) -> Usage:
    """Return what the machine's processes take, where no control group counts it: those there are now (proc(5), statm)."""
    private = shared = 0
    seconds = 0.0
    waiting = [place.keeper.read_text().split()[0]] if place.keeper.exists() else []
    while waiting:
        folder = Path("/proc") / waiting.pop()
        try:
            _, resident, file, *_ = (int(word) for word in (folder / "statm").read_text().split())
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            waiting += (folder / "task" / folder.name / "children").read_text().split()
        except OSError:  # it has ended
            continue
        private += (resident - file) * _PAGE
        shared += file * _PAGE
        seconds += (int(fields[11]) + int(fields[12])) / _TICK
    return Usage(private=private, shared=shared, cpu_seconds=seconds)


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
