"""What bounds a QEMU from outside: its processors and its disk's rates. Memory and vCPUs are the machine's own and end where they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trivisor.core.errors import UnsupportedByWall
from trivisor.core.spec import Spec
from trivisor.launch import cgroups
from trivisor.launch.cgroups import Cgroup, Limits
from trivisor.vmm.engine import Box

_OUTSIDE = ("cpuset", "io")
_INSIDE = {"swap": "take swap from the host", "pids": "bound the processes of its guest"}


def check(spec: Spec) -> None:
    """Raise UnsupportedByWall for a limit that means nothing here, HostLacks for one that this host cannot enforce."""
    for name, what in _INSIDE.items():
        if name in spec.asked:
            raise UnsupportedByWall(what, "vm", ("gvisor", "container"))
    cgroups.limits_possible(Limits.of(spec, _OUTSIDE))


@contextmanager
def group(box: Box) -> Iterator[Sequence[int]]:
    """Make the control group that the machine's limits ask for, if any; give the descriptors to join it by."""
    limits = Limits.of(box.spec, _OUTSIDE)
    if not limits.given:
        yield ()
        return
    with Cgroup.create(box.home, box.id, limits) as made:
        yield made.fds
