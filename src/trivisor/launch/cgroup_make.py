"""Making a group in one hierarchy, and giving it a limit."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

from trivisor.core.errors import HostLacks
from trivisor.launch.cgroup_layout import Hierarchy
from trivisor.launch.cgroup_limits import Setting
from trivisor.launch.cgroup_place import Place, write

_TRIES = 100


def make(found: Hierarchy, place: Place) -> None:
    """Make the group and the one of its home. Other processes remove the latter when they find it empty."""
    for _ in range(_TRIES):
        try:
            place.path.parent.mkdir(exist_ok=True)
            if not found.unified and "cpuset" in place.controllers:
                _inherit(found.base, place.path.parent)
            place.path.mkdir(exist_ok=True)
            if not found.unified and "cpuset" in place.controllers:
                _inherit(place.path.parent, place.path)
            for name in sorted(place.controllers - {"freezer"}) if found.unified else ():
                for group in (found.base, place.path.parent):
                    _enable(group, name)
            return
        except (FileNotFoundError, FileExistsError):  # the latter: it was there, and is gone again
            continue
        except OSError as error:
            if error.errno == errno.ENODEV:  # the home's went between its name's being looked up and its use
                continue
            raise HostLacks(f"the group {place.path} cannot be made: {error.strerror}", hint="see `trivisor doctor`") from error
    raise HostLacks(f"the group {place.path} was removed {_TRIES} times as it was made", hint="start again")


def _enable(group: Path, controller: str) -> None:
    """Give the groups below `group` a controller, if it can be."""
    if controller not in (group / "cgroup.subtree_control").read_text().split():
        # EBUSY: processes live in it. That the limit's file is not there is what tells, when it is written.
        with contextlib.suppress(OSError):
            write(group / "cgroup.subtree_control", f"+{controller}")


def _inherit(above: Path, group: Path) -> None:
    """Give a v1 cpuset, born empty, what the one above has: nobody may join an empty one."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if not (group / file).read_text().strip():
            write(group / file, (above / file).read_text().strip())


def apply(place: Place, setting: Setting) -> None:
    file = place.path / setting.file
    try:
        write(file, setting.value)
    except FileNotFoundError:
        above = place.path.parent.parent
        busy = place.unified and (above / "cgroup.procs").exists() and (above / "cgroup.procs").read_text().strip()
        why = f"processes live in {above}, so it cannot share out its controllers" if busy else f"the kernel has no {setting.file}"
        hint = "move them into a group below it (cgroups(7), no internal processes)" if busy else "use a kernel that is built with it"
        raise HostLacks(f"{setting.limit} cannot be limited on this host: {why}", hint=hint) from None
    except OSError as error:
        why = f"the kernel refuses {setting.value!r} for {setting.file}: {error.strerror}"
        hint = f"the host has the processors {_online()}" if setting.limit == "cpuset" else ""
        raise HostLacks(f"{setting.limit} cannot be limited so on this host: {why}", hint=hint) from error


def _online() -> str:
    return Path("/sys/devices/system/cpu/online").read_text().strip()
