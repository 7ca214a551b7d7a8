"""What limits mean to the kernel: which file of which controller gets which value. Pure; nothing is written here.

Two things that v1 cannot do are said rather than half done: it does not account buffered writes to who made them, so
it cannot limit writing; and where it is built without swap accounting, it has no memory.memsw.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trivisor.core.errors import HostLacks
from trivisor.core.spec import LIMITS, Spec
from trivisor.core.wishes import IoLimits

DEFAULT_PIDS = 2048
"""Processes and threads of a machine for which nothing was asked: what stops a fork bomb and troubles nobody else."""

_PERIOD = 100_000
"""Microseconds in which a quota is given out (the kernel's default)."""
_LEAST_QUOTA = 1000
_IO_KEYS = {"read_bps": "rbps", "write_bps": "wbps", "read_iops": "riops", "write_iops": "wiops"}


@dataclass(frozen=True)
class Limits:
    """What a machine may take. None: no limit. `asked` names those that must hold, or be an error."""

    memory: int | None = None
    swap: int | None = None
    """Bytes of swap beside `memory`."""
    cpus: float | None = None
    cpuset: str | None = None
    pids: int | None = None
    io: IoLimits | None = None
    asked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, spec: Spec, only: Collection[str] = LIMITS) -> Self:
        """Return the limits in `spec`; with `only` some of them (QEMU bounds memory and cpus of its machine by itself)."""
        wishes = {name: getattr(spec, name) for name in LIMITS}
        wishes["pids"] = wishes["pids"] or DEFAULT_PIDS
        return cls(**{name: value for name, value in wishes.items() if name in only}, asked=frozenset(spec.asked) & set(only))

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the limits that there are."""
        return tuple(name for name in LIMITS if getattr(self, name) is not None)


@dataclass(frozen=True)
class Setting:
    """One value for one file. `limit` names the field of Limits that it carries out."""

    limit: str
    controller: str
    file: str
    value: str


CONTROLLER = {"memory": "memory", "swap": "memory", "cpus": "cpu", "cpuset": "cpuset", "pids": "pids", "io": "io"}
"""Limit to controller."""


def settings(limits: Limits, limit: str, *, unified: bool, disk: Path) -> Iterator[Setting]:
    """Return what carries out one limit in a v2 (`unified`) or v1 hierarchy. `disk` is a path on the device that `io` bounds.

    Raises HostLacks for what this kind of hierarchy cannot do.
    """
    controller = CONTROLLER[limit]
    for file, value in (_v2 if unified else _v1)(limits, limit, disk):
        yield Setting(limit, controller, file, value)


def unlimited_swap(*, unified: bool) -> Iterator[Setting]:
    """Return what takes away a limit of swap."""
    yield Setting("swap", "memory", "memory.swap.max", "max") if unified else Setting("swap", "memory", "memory.memsw.limit_in_bytes", "-1")


def _v2(limits: Limits, limit: str, disk: Path) -> Iterator[tuple[str, str]]:
    if limit == "memory":
        yield "memory.max", str(limits.memory)
    elif limit == "swap":
        yield "memory.swap.max", str(limits.swap)
    elif limit == "cpus":
        yield "cpu.max", f"{_quota(limits)} {_PERIOD}"
    elif limit == "cpuset":
        yield "cpuset.cpus", str(limits.cpuset)
    elif limit == "pids":
        yield "pids.max", str(limits.pids)
    elif limits.io is not None:
        words = [f"{key}={value}" for name, key in _IO_KEYS.items() if (value := getattr(limits.io, name)) is not None]
        if words:
            yield "io.max", " ".join([device(disk), *words])


def _v1(limits: Limits, limit: str, disk: Path) -> Iterator[tuple[str, str]]:
    if limit == "memory":
        yield "memory.limit_in_bytes", str(limits.memory)
    elif limit == "swap":
        yield "memory.memsw.limit_in_bytes", str((limits.memory or 0) + (limits.swap or 0))
    elif limit == "cpus":
        yield "cpu.cfs_period_us", str(_PERIOD)
        yield "cpu.cfs_quota_us", str(_quota(limits))
    elif limit == "cpuset":
        yield "cpuset.cpus", str(limits.cpuset)
    elif limit == "pids":
        yield "pids.max", str(limits.pids)
    elif limits.io is not None:
        if limits.io.write_bps is not None or limits.io.write_iops is not None:
            raise HostLacks(
                "cgroup v1 cannot limit writing to disks: it does not know whose the buffered writes are",
                hint="give read_bps and read_iops alone, or boot with systemd.unified_cgroup_hierarchy=1",
            )
        for name in ("read_bps", "read_iops"):
            if (value := getattr(limits.io, name)) is not None:
                yield f"blkio.throttle.{name}_device", f"{device(disk)} {value}"


def _quota(limits: Limits) -> int:
    return max(_LEAST_QUOTA, math.ceil((limits.cpus or 0) * _PERIOD))


def device(path: Path) -> str:
    """Return "MAJOR:MINOR" of the whole disk that `path` lies on: no partition can be limited. Raises HostLacks if it has none."""
    number = os.stat(path).st_dev
    if os.major(number) == 0:
        number = _source(path.resolve())
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        raise HostLacks(f"{path} lies on no disk whose use can be limited", hint="have the home (TRIVISOR_HOME) on a disk of its own")
    disk = entry.resolve().parent if (entry / "partition").exists() else entry
    return (disk / "dev").read_text().strip()


def _source(path: Path) -> int:
    """The device of a file system whose files have a number that is no device's (btrfs), out of mountinfo; or 0."""
    best, source = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        at = left.split()[4]
        if len(at) >= len(best) and path.is_relative_to(at):
            best, source = at, right.split()[1]
    return os.stat(source).st_rdev if source.startswith("/dev/") and Path(source).exists() else 0
