"""What happened to machines, as values. Records keeps them; `VMM.events()` streams them."""

from __future__ import annotations

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened. `time` is seconds since the epoch, `id` grows by one an event in a home.

    `kind` is a verb in the past: created, started, paused, resumed, suspended, restored, forked, stopped, failed, deleted, swept,
    image-imported, disk-imported, snapshot-imported, snapshot-removed; or "snapshot": one was taken;
    or "oom": the host's kernel killed a process in it because its memory limit was met;
    or "watchdog": its watchdog fired (docs/devices.md);
    or "network": how it is connected was changed; or "egress": a policy of names refused it something (docs/network.md).
    `detail` says more in words a person reads, and may be empty.
    """

    id: int
    time: float
    kind: str
    machine: str
    """The machine's id; empty for events of no machine."""
    name: str
    detail: str = ""
