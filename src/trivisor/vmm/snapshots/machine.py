"""The part of Machine that makes and takes snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

from trivisor.core.units import parse_duration
from trivisor.vmm import network
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Progress
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import verbs
from trivisor.vmm.snapshots.model import About, Snapshot
from trivisor.vmm.snapshots.service import shown


class Freezable:
    """What Machine is too: a machine that can be frozen, and come back."""

    def __init__(self, context: Context, row: Row) -> None:
        self._context = context
        self._first = row

    @property
    def id(self) -> str:
        return self._first.id

    def snapshot(
        self,
        name: str,
        *,
        memory: bool | None = None,
        note: str = "",
        tags: Iterable[str] = (),
        ttl: float | str | None = None,
        keep: bool = False,
        quiesce: bool = False,
    ) -> Snapshot:
        """Freeze it under a name; it goes on at once. With `memory` all that runs in it is in the snapshot, without it its files alone.

        Without a word on memory it is frozen where the wall can and the machine runs or is paused. `note` and `tags` are for people;
        after `ttl` (seconds, or "7d") it is removed; with `keep` it is never removed but by name. With `quiesce` its file systems are
        brought to a consistent state first. Raises InvalidSpec, InvalidState, AlreadyExists, UnsupportedByWall, Busy, EngineError,
        GuestError, HostLacks, StorageError; nothing is left then.
        """
        about = About(note=note, tags=tuple(tags), quiesced=quiesce)
        seconds = None if ttl is None else parse_duration(ttl, "ttl")
        return shown(self._context, verbs.snapshot(self._context, self.id, name, about, memory=memory, ttl=seconds, keep=keep))

    def restore(self, name: str, *, progress: Progress | None = None) -> None:
        """Have it be what it was at that snapshot, and run. `name` is "ready", or another machine's "web@ready" of the same image.

        What it was until now is gone. Raises NotFound, InvalidState, InvalidSpec, Busy, OverBudget; HostLacks or StorageError before
        anything is touched, if the snapshot cannot be run on this host or is damaged; else what start raises: then start tries again.
        """
        self._context.lines.drop(self.id)
        try:
            row = verbs.restore(self._context, self.id, name, progress or (lambda _: None))
        finally:
            self._context.lines.drop(self.id)
        network.started(self._context, row)

    def fork(self, n: int = 1, *, names: Sequence[str] | None = None, progress: Progress | None = None) -> list[Self]:
        """Make `n` running copies of it, in each of which goes on what runs in it; it goes on too. On the container wall the copies have
        its files, and start anew.

        Each is a machine of its own: id, name (`names`, else NAME-1, NAME-2...), hostname, address, machine id, random numbers, and for
        each published port another port of the host. All of them or none. Raises InvalidState, InvalidSpec, AlreadyExists,
        UnsupportedByWall, Busy, OverBudget, EngineError, GuestError, HostLacks, StorageError.
        """
        rows = verbs.fork(self._context, self.id, n, names, progress or (lambda _: None))
        made = [type(self)(self._context, row) for row in rows]
        for row in rows:
            self._context.held(row.id).policy = self._context.held(self.id).policy
            network.started(self._context, row)
        return made

    def suspend(self) -> None:
        """Put it away: its memory is on the disk, no process of it is left; `resume` goes on with it, after a reboot of the host too.

        Raises InvalidState, UnsupportedByWall, Busy, EngineError, GuestError, StorageError: then it goes on as before.
        """
        try:
            verbs.suspend(self._context, self.id)
        finally:
            self._context.lines.drop(self.id)
