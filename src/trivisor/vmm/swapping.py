"""How much of the host's swap a machine may have, changed while it runs: container and gvisor, whose memory is the host's to swap."""

from __future__ import annotations

from typing import Any

import msgspec

from trivisor.core.errors import HostLacks, InvalidSpec
from trivisor.core.spec import checked, swap_size
from trivisor.launch.cgroups import Cgroup, Limits
from trivisor.vmm import life, reconcile
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row

_IDLE: dict[str, Any] = {"operation": "", "operator": None}


def swap(context: Context, machine: str, wish: int | str | None) -> None:
    """Change it for a machine, at once if it runs, and for its next starts. Raises InvalidSpec, UnsupportedByWall, HostLacks."""
    size = None if wish is None else swap_size(wish)
    with life.operation(context, machine, "limit") as row:
        asked = tuple(name for name in row.spec.asked if name != "swap") + (() if size is None else ("swap",))
        spec = checked(msgspec.structs.replace(row.spec, swap=size, asked=asked))
        context.engine(spec.wall, row.name).check(spec)
        if row.state in reconcile.LIVE and spec.wall != "vm":
            _enforce(context, msgspec.structs.replace(row, spec=spec))
        words = "as the host has it" if size is None else f"{size} bytes"
        context.records.update(row.id, spec=spec, event=("limit", f"swap is {words}"), **_IDLE)


def _enforce(context: Context, row: Row) -> None:
    group = Cgroup.find(context.home, row.id)
    use = group.memory() if group is not None else None
    if group is None or use is None:
        raise HostLacks("swap cannot be limited on this host", machine=row.name, hint="`trivisor doctor` says why")
    if row.spec.swap is not None and use.swap > row.spec.swap:
        raise InvalidSpec(
            f"{row.spec.swap} bytes of swap are less than the {use.swap} that it has there",
            machine=row.name,
            hint="end some of its programs first",
        )
    group.limit_swap(Limits.of(row.spec), context.home)
