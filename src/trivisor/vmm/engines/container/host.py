"""What a container takes of the host beside its ids and layers: what confines it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from trivisor.core.errors import HostLacks
from trivisor.core.spec import Spec
from trivisor.launch import seccomp
from trivisor.launch.jail import probe
from trivisor.vos.ports import SyscallPort

_PROFILE = "docker-default"
"""Docker's AppArmor profile. It is Docker's to load: a profile of our own would need root to install."""
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")
_KSM = Path("/sys/kernel/mm/ksm")
_MERGE_SINCE = (6, 7)
"""Before, a program that was executed did not keep PR_SET_MEMORY_MERGE."""
_PROCESSORS = Path("/sys/devices/system/cpu")


def merging(spec: Spec) -> None:
    """Raise HostLacks if its programs' pages are to be merged with others' and this kernel does not have it so."""
    if not spec.dedupe:
        return
    version = tuple(int(word) for word in re.findall(r"\d+", os.uname().release)[:2])
    if not _KSM.is_dir() or version < _MERGE_SINCE:
        raise HostLacks(
            "this host's kernel cannot merge the pages of containers", hint="that takes Linux 6.7 with CONFIG_KSM; leave out dedupe"
        )


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


@functools.cache
def syscalls() -> SyscallPort:
    """Return what this host's kernel does for vos.syscalls, of no machine yet."""
    try:
        actions = set(_ACTIONS.read_text().split())
    except OSError:  # a kernel without, or a host that hides it: what is needed is then asked for in vain, and says so
        actions = {"user_notif", "trace", "log"}
    features = {"kernel"}
    features |= {"notify"} if "user_notif" in actions else set()
    features |= {"log"} if "log" in actions else set()
    features |= {"trace", "no-vdso"} if "trace" in actions else set()
    features |= {"landlock"} if probe().landlock else set()
    return SyscallPort("container", frozenset(features), seccomp.CONTAINER, why="this host's kernel lacks it")


def confinement() -> dict[str, str]:
    """Return what confines a container on this host, for doctor."""
    landlock = probe().landlock
    has = ["seccomp", "capabilities as Docker's", *([f"Landlock (ABI {landlock})"] if landlock >= 2 else [])]
    if apparmor():
        has.append(f"AppArmor ({apparmor()})")
    return {"confined by": ", ".join(has) + (f"; lacks {', '.join(lacks())}" if lacks() else "")}
