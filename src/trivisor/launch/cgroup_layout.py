"""Where on this host control groups can be made: one v2 hierarchy, one v1 hierarchy a controller, or both at once (hybrid).

cgroups(7) and Documentation/admin-guide/cgroup-v2.rst. A group of ours lies in a hierarchy's *base*:

root        the hierarchy as it is mounted here
others      the highest group above this process that is its user's own: the one that systemd delegates to a user
            (user@UID.service). A process that lies outside of it, as in a login session's scope, has none, since a process is
            moved only by who may write to the group above both places.

Nothing is made or changed by looking.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["v2", "v1", "hybrid", "none"]

CONTROLLERS = ("memory", "cpu", "cpuset", "pids", "io", "freezer")
"""What we use, by their v2 names; in v1 `io` is blkio. In v2 the freezer is not a controller: every group has it."""
_V1_NAMES = {"blkio": "io"}
_DELEGATE = "log in through systemd and start it with `systemd-run --user --scope -p Delegate=yes`, or run it as root"
_DELEGATE_ALL = "have systemd delegate it: Delegate=cpu cpuset io memory pids for user@.service (systemd.resource-control(5))"


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy in which we may make groups."""

    base: Path
    controllers: frozenset[str]
    unified: bool


@dataclass(frozen=True)
class Layout:
    """What there is. `lacks` says of each controller that cannot be used why, and `remedies` what to do."""

    kind: Kind
    hierarchies: tuple[Hierarchy, ...]
    lacks: dict[str, str]
    remedies: dict[str, str]

    def of(self, controller: str) -> Hierarchy | None:
        """Return the hierarchy that has a controller."""
        return next((found for found in self.hierarchies if controller in found.controllers), None)

    @property
    def unified(self) -> Hierarchy | None:
        return next((found for found in self.hierarchies if found.unified), None)

    def __str__(self) -> str:
        have = [name for name in CONTROLLERS if self.of(name)]
        return f"{self.kind}: {', '.join(have) or 'nothing'}" + "".join(f"; no {name}: {why}" for name, why in self.lacks.items())


@dataclass(frozen=True)
class _Mount:
    at: Path
    root: str
    """The group that is mounted there, as its hierarchy names it."""
    unified: bool
    controllers: frozenset[str]


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    """Read proc_pid_mountinfo(5). A hierarchy that is mounted twice counts once."""
    seen = set()
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind, options = left.split(), right.split()[0], right.split()[-1]
        if kind not in ("cgroup", "cgroup2") or fields[2] in seen:
            continue
        seen.add(fields[2])
        names = frozenset(_V1_NAMES.get(name, name) for name in options.split(",")) & {*CONTROLLERS, "cpuacct"}
        yield _Mount(Path(_unescape(fields[4])), _unescape(fields[3]), kind == "cgroup2", names if kind == "cgroup" else frozenset())


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _own(text: str) -> dict[str, str]:
    """Return {controller, or "" for v2: path of this process's group} out of /proc/self/cgroup."""
    own = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            own[_V1_NAMES.get(name, name)] = path
    return own


def _above(mount: _Mount, own: str) -> Iterator[Path]:
    """The group mounted, and those from there down to our own."""
    yield mount.at
    inside = os.path.relpath(own, mount.root)
    if inside == "." or inside.startswith(".."):
        return
    at = mount.at
    for part in inside.split("/"):
        at /= part
        yield at


def _writable(group: Path) -> bool:
    files = ("", "cgroup.procs", "cgroup.subtree_control") if (group / "cgroup.subtree_control").exists() else ("", "cgroup.procs")
    return all(os.access(group / file, os.W_OK) for file in files)


def read(mountinfo: str, own: str, *, writable: Callable[[Path], bool] = _writable) -> Layout:
    """Return the layout that these two files of /proc/self describe."""
    groups = _own(own)
    hierarchies = []
    lacks: dict[str, str] = {}
    remedies: dict[str, str] = {}
    mounts = list(_mounts(mountinfo))
    for mount in mounts:
        path = groups.get("" if mount.unified else min(mount.controllers, default="?"), "/")
        base = next((group for group in _above(mount, path) if writable(group)), None)
        names = _enabled(base or mount.at) | {"freezer"} if mount.unified else mount.controllers
        if base is not None and names:
            hierarchies.append(Hierarchy(base, names, mount.unified))
        elif base is None:
            lacks |= dict.fromkeys(names, f"no group in {mount.at} is this user's to use")
            remedies |= dict.fromkeys(names, _DELEGATE)
    # The unified hierarchy first: its freezer can be waited for, and kills too.
    hierarchies.sort(key=lambda found: not found.unified)
    have = {name for found in hierarchies for name in found.controllers}
    for name in CONTROLLERS:
        if name in have:
            lacks.pop(name, None)
        elif name not in lacks:
            lacks[name], remedies[name] = _missing(name, hierarchies)
    kinds = {mount.unified for mount in mounts if mount.unified or mount.controllers}
    kind: Kind = "none" if not kinds else "hybrid" if len(kinds) == 2 else "v2" if True in kinds else "v1"
    return Layout(kind, tuple(hierarchies), lacks, remedies)


def _missing(name: str, hierarchies: list[Hierarchy]) -> tuple[str, str]:
    unified = next((found for found in hierarchies if found.unified), None)
    if unified is not None and (unified.base / "cgroup.events").exists():  # not the host's root group: somebody gave it to us
        return f"{unified.base} was given no {name} controller", _DELEGATE_ALL
    return f"no {name} controller is mounted", f"mount cgroup2 on /sys/fs/cgroup, with a kernel that has the {name} controller"


def _enabled(base: Path) -> frozenset[str]:
    try:
        return frozenset((base / "cgroup.controllers").read_text().split()) & set(CONTROLLERS)
    except OSError:
        return frozenset()


@functools.cache
def _layout(_uid: int) -> Layout:
    return read(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())


def layout() -> Layout:
    """Return this host's layout; it is kept for this process and user."""
    return _layout(os.geteuid())
