"""The memory that the machines of a home may have of the host together, and who holds how much of it.

The budget is in the home's records, so it holds for all processes that have the home open. What a machine may have is written into its
row in the same transaction in which the others' are added up: two that start at once cannot both take the last of it, and one whose
process is killed leaves a row that is put right like any other. What a machine holds:

runs            what it was granted: its `memory`, or what it was grown to
paused          what it takes of the host now, since it cannot take more until it is resumed, which asks again
neither         nothing

With an overcommit above 1, running machines together may be promised that many times the budget; then, too, what all of them really
take, with the new one in full, must fit into the budget itself. If something does not fit, paused machines are made to give up what they
can, and then idle ones; if it still does not fit, that is an error that names who holds what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import msgspec

from trivisor.core.errors import HostError, InvalidSpec, OverBudget
from trivisor.core.state import State
from trivisor.core.units import format_size, parse_size
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm import reconcile
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row

_SETTING = "memory-budget"
MAX_OVERCOMMIT = 100.0


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a home's machines may have together. `memory` is bytes."""

    memory: int
    overcommit: float = 1.0
    """How many times `memory` running machines may be promised, as long as what they really take fits."""

    @property
    def promised(self) -> int:
        """Bytes that may be promised."""
        return int(self.memory * self.overcommit)


@dataclass(frozen=True)
class Holding:
    """What one machine holds of a budget, in bytes."""

    name: str
    state: str
    holds: int
    takes: int
    """What it takes of the host now."""


class MemoryBudget:
    """`vmm.budget`: the memory that the machines of this home may have together."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def get(self) -> Budget | None:
        """Return the budget, or None if there is none."""
        return _read(self._context)

    def set(self, memory: int | str, overcommit: float = 1.0) -> None:
        """Give the home a budget ("8G", or bytes), for all its processes, at once and until it is changed.

        One that is less than what is held takes nothing away: nothing more starts until there is room. Raises InvalidSpec, StorageError.
        """
        if isinstance(overcommit, bool) or not isinstance(overcommit, int | float) or not 1 <= overcommit <= MAX_OVERCOMMIT:
            raise InvalidSpec(f"overcommit must be 1 to {MAX_OVERCOMMIT:g}, not {overcommit!r}")
        budget = Budget(memory=parse_size(memory, "memory budget"), overcommit=float(overcommit))
        self._context.records.set_setting(_SETTING, msgspec.json.encode(budget).decode())

    def clear(self) -> None:
        """Take the budget away."""
        self._context.records.set_setting(_SETTING, None)

    def holdings(self) -> list[Holding]:
        """Return what each machine that runs or is paused holds, the largest first."""
        rows = _live(self._context)
        takes = _takes(self._context, rows)
        found = [Holding(row.name, row.state.value, _holds(row, takes), takes[row.id]) for row in rows]
        return sorted(found, key=lambda one: (-one.holds, one.name))


def admit(context: Context, machine: str, size: int) -> None:
    """Grant a machine `size` bytes in all, from now until it is paused or ends, beside what the others hold.

    To be called while the machine's operation stands, before it gets the memory. Paused and idle machines are made to give up what they can
    if that makes room. Raises OverBudget.
    """
    budget = _read(context)
    if budget is None:
        row = context.records.row(machine)
        if row is not None and row.granted:
            context.records.update(machine, granted=0)
        return
    possible(context, size)
    reclaimed = False
    while True:
        others = _live(context, but=machine)
        takes = _takes(context, [row for row in others if row.state is State.PAUSED or budget.overcommit > 1])
        try:
            context.records.grant(machine, partial(_decide, budget, machine, size, takes))
            return
        except OverBudget as error:
            if reclaimed:
                raise
            # What a machine that runs takes counts only where more is promised than there is.
            _reclaim([row for row in others if row.id in takes], context, error.lacking)
            reclaimed = True


@contextmanager
def changing(context: Context, row: Row, size: int) -> Iterator[None]:
    """Around what gives a running machine `size` bytes in all, more or less than it has: more is granted before, less given back after.

    If the body fails, it holds what it held. Raises OverBudget.
    """
    more = size > (row.granted or row.spec.memory)
    if row.state is not State.RUNNING:
        yield
        return
    if more:
        admit(context, row.id, size)
    try:
        yield
    except BaseException:
        context.records.update(row.id, granted=row.granted)
        raise
    if not more:
        admit(context, row.id, size)


def possible(context: Context, size: int) -> None:
    """Raise OverBudget for a machine that has no room even if nothing else runs."""
    budget = _read(context)
    if budget is not None and size > budget.memory:
        raise OverBudget(budget.memory, size, (), size - budget.memory)


def _decide(budget: Budget, machine: str, size: int, takes: Mapping[str, int], rows: Sequence[Row]) -> int:
    """Return `size` if it fits beside what the others hold. Raises OverBudget."""
    others = [row for row in rows if row.id != machine]
    held = {row.name: _holds(row, takes) for row in others}
    lacking = sum(held.values()) + size - budget.promised
    if budget.overcommit > 1:
        taken = {row.name: min(held[row.name], takes.get(row.id, held[row.name])) for row in others}
        short = sum(taken.values()) + size - budget.memory
        if short > lacking:
            held, lacking = taken, short
    if lacking > 0:
        holders = sorted(((name, value) for name, value in held.items() if value), key=lambda one: (-one[1], one[0]))
        raise OverBudget(budget.memory, size, holders, lacking)
    return size


def _holds(row: Row, takes: Mapping[str, int]) -> int:
    if row.granted:
        return row.granted
    if row.state is State.PAUSED:
        return min(row.spec.memory, takes.get(row.id, row.spec.memory))
    # It runs since before there was a budget.
    return row.spec.memory if row.state is State.RUNNING else 0


def _live(context: Context, *, but: str = "") -> list[Row]:
    """Return the machines that run or are paused, with what crashes left in their records put right."""
    settled = [reconcile.settle(context, row) for row in context.records.rows() if row.id != but]
    return [row for row in settled if row is not None and (row.state in reconcile.LIVE or row.granted)]


def _takes(context: Context, rows: Sequence[Row]) -> dict[str, int]:
    """Return what each takes of the host now, by its id: as its control group counts, files that it read among them; or alone its own."""
    found = {}
    for row in rows:
        group = Cgroup.find(context.home, row.id) if row.spec.wall != "vm" else None
        use = group.memory() if group is not None else None
        try:
            found[row.id] = use.used if use is not None else context.engine(row.spec.wall, row.name).usage(context.box(row)).private
        except HostError:  # it ends at this moment
            found[row.id] = row.spec.memory
    return found


def _reclaim(rows: Sequence[Row], context: Context, lacking: int) -> None:
    """Have machines give up `lacking` bytes: paused ones first, who will not miss them soon."""
    for row in sorted(rows, key=lambda row: (row.state is not State.PAUSED, row.started or 0.0)):
        if lacking <= 0:
            return
        group = Cgroup.find(context.home, row.id)
        if group is not None:
            lacking -= group.reclaim(lacking)


def _read(context: Context) -> Budget | None:
    said = context.records.setting(_SETTING)
    return msgspec.json.decode(said, type=Budget) if said is not None else None


def words(budget: Budget | None) -> str:
    """Return a budget as a person reads it."""
    if budget is None:
        return "none"
    return format_size(budget.memory) + (f", overcommitted {budget.overcommit:g} times" if budget.overcommit > 1 else "")
