"""What bounds a QEMU from outside: its processors and its disk's rates. Memory is the machine's own and ends where it ends.

So do vCPUs, but for those that are only there to be given later: a guest could bring them up by itself. What it has of the host's
processors is bounded, and where that cannot be there are none to spare.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from trivisor.core.errors import UnsupportedByWall
from trivisor.core.spec import Spec
from trivisor.launch import cgroup_layout, cgroups
from trivisor.launch.cgroup_layout import Hierarchy
from trivisor.launch.cgroups import Cgroup, Limits
from trivisor.vmm.engine import Box

_OUTSIDE = ("cpuset", "io")
_OF_QEMU = 0.5
"""Processors beside the guest's vCPUs, for QEMU's own threads: disks, network, the monitor."""
MAX_SPARE = 16
_INSIDE = {"swap": "take swap from the host", "pids": "bound the processes of its guest"}


def check(spec: Spec) -> None:
    """Raise UnsupportedByWall for a limit that means nothing here, HostLacks for one that this host cannot enforce."""
    for name, what in _INSIDE.items():
        if name in spec.asked:
            raise UnsupportedByWall(what, "vm", ("gvisor", "container"))
    cgroups.limits_possible(Limits.of(spec, _OUTSIDE))


def spare_cpus(spec: Spec) -> int:
    """Return how many vCPUs a machine has beyond those it begins with: as many as the host has processors for, and one in any case."""
    if not shared_out(cgroup_layout.layout().of("cpu")):
        return 0
    return max(0, min(max(2, os.cpu_count() or 1), MAX_SPARE) - int(spec.cpus))


@contextmanager
def group(box: Box) -> Iterator[Sequence[int]]:
    """Make the control group that the machine's limits ask for, if any; give the descriptors to join it by."""
    limits = _limits(box, box.spec.cpus if spare_cpus(box.spec) else None)
    if not limits.given:
        yield ()
        return
    with Cgroup.create(box.home, box.id, limits) as made:
        yield made.fds


def shared_out(found: Hierarchy | None) -> bool:
    """Whether groups there can be given shares of processors: one of version 2 hands no controller down while processes live in it."""
    if found is None:
        return False
    if not found.unified or not (found.base / "cgroup.events").exists():
        return True
    try:
        return "cpu" in (found.base / "cgroup.subtree_control").read_text().split() or not (found.base / "cgroup.procs").read_text().strip()
    except OSError:
        return False


def share(box: Box, cpus: float) -> None:
    """Bound a running machine to so many vCPUs' worth of the host's processors, if it is bounded."""
    group = Cgroup.find(box.home, box.id)
    if group is not None:
        group.limit_cpus(_limits(box, cpus), box.home)


def _limits(box: Box, cpus: float | None) -> Limits:
    return replace(Limits.of(box.spec, _OUTSIDE), cpus=None if cpus is None else cpus + _OF_QEMU)
