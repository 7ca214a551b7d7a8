"""What a machine has of memory, processors and disk, changed: a plan that says what is done now, and its being done.

now       the machine runs, and its wall can
restart   the machine runs, and cannot have it before its next start, for which it is kept
start     the machine does not run: from its next start on

On the container and gVisor walls it is a control group's limits. A virtual machine's guest takes part (engines/vm/growth.py): it brings up
vCPUs, takes memory and gives it back, as far as it can. A disk only ever grows (stretch.py). Each change is written down when it has been
made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from trivisor.core.errors import (
    CallerError,
    FileError,
    GuestError,
    GuestShort,
    HostLacks,
    InvalidSpec,
    InvalidState,
    NotFound,
    OverBudget,
    UnsupportedByWall,
)
from trivisor.core.spec import Spec, checked
from trivisor.core.state import State, check
from trivisor.core.units import format_size, parse_size
from trivisor.launch.cgroups import Cgroup, Limits
from trivisor.vmm import budget, life, reconcile, stretch
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import thawing
from trivisor.vos.files import Files
from trivisor.vos.memory.stats import available

TIMEOUT = 10.0
"""Seconds for a guest to take part."""
_IDLE: dict[str, Any] = {"operation": "", "operator": None}
_FIGURES_MAX = 64 << 10
_END = "end some of them first"
_GIVES = "its programs hold the rest, or its kernel is without virtio_balloon"
_PAGE = 4096
_MARGIN = 16 << 20
"""Memory that a guest's own kernel needs to move what is in the way."""


class Sizes(Protocol):
    """What memory a running virtual machine has, in bytes."""

    @property
    def base(self) -> int:
        """What it was started with."""
        ...

    @property
    def now(self) -> int: ...

    @property
    def balloon(self) -> int:
        """What the guest has given up of `base`."""
        ...


class Growth(Protocol):
    """The memory and the vCPUs of one running machine, as its engine has them."""

    def sizes(self) -> Sizes: ...

    def room(self) -> int: ...

    def cpus(self) -> int: ...

    def resize(self, size: int, timeout: float) -> None: ...

    def bring_up(self, count: int, timeout: float) -> None: ...

    def balloon(self, size: int, timeout: float) -> int: ...


@runtime_checkable
class Growable(Protocol):
    """An engine whose machines can be given vCPUs and memory of their own while they run."""

    def growth(self, box: Box) -> Growth: ...


@dataclass(frozen=True)
class Change:
    """One thing that is other than it was. `why` says what stands in the way of having it now, `note` what is to be known of it."""

    what: Literal["cpus", "memory", "disk"]
    before: int | float
    after: int | float
    when: Literal["now", "restart", "start"]
    why: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a modification changes; empty if nothing."""

    changes: tuple[Change, ...] = ()

    @property
    def restart(self) -> bool:
        """Whether something of it has to wait until the machine is stopped and started."""
        return any(change.when == "restart" for change in self.changes)

    def __str__(self) -> str:
        return "\n".join(map(_words, self.changes)) or "nothing changes"


def modify(
    context: Context,
    machine: str,
    files: Callable[[], Files],
    *,
    cpus: int | float | None = None,
    memory: int | str | None = None,
    disk: int | str | None = None,
    dry_run: bool = False,
    timeout: float = TIMEOUT,
) -> Plan:
    """Carry out a change, or with `dry_run` only plan it. Raises what Machine.modify says."""
    wishes: dict[str, Any] = {}
    if cpus is not None:
        wishes["cpus"] = int(cpus) if isinstance(cpus, float) and cpus.is_integer() else cpus
    if memory is not None:
        wishes["memory"] = parse_size(memory, "memory")
    if disk is not None:
        wishes["disk"] = parse_size(disk, "disk")
    if not dry_run:
        with _operation(context, machine, "modify") as row:
            plan = _plan(context, row, wishes)
            _carry_out(context, row, plan.changes, files, timeout)
        return plan
    found = reconcile.settle(context, context.row(machine))
    if found is None:
        raise NotFound(f"machine {machine} is gone", machine=machine, hint="it was deleted")
    check(found.name, found.state, "modify")
    return _plan(context, found, wishes)


def limit(context: Context, machine: str, files: Callable[[], Files], wish: int | str, timeout: float = TIMEOUT) -> None:
    """Change what a machine may have: now, if it runs, and from its next start on. Raises what Memory.limit says."""
    size = parse_size(wish, "memory")
    with _operation(context, machine, "limit") as row:
        plan = _plan(context, row, {"memory": size})
        for change in plan.changes:
            if change.when == "restart":
                raise InvalidSpec(
                    f"not while it runs: {change.why}", machine=row.name, hint="modify(memory=...) keeps it for the next start"
                )
        _carry_out(context, row, plan.changes, files, timeout)


def balloon(context: Context, machine: str, wish: int | str, timeout: float = TIMEOUT) -> int:
    """Have a virtual machine's guest give up memory. Raises what Memory.balloon says."""
    size = 0 if wish in (0, "0") and not isinstance(wish, bool) else parse_size(wish, "balloon")
    with _operation(context, machine, "limit") as row:
        growth = _growth(context, row, "take memory from a guest by a balloon")
        if row.state is not State.RUNNING:
            raise InvalidState(row.name, row.state.value, "limit", [State.RUNNING.value])
        reached = growth.balloon(size, timeout)
        context.records.update(machine, event=("limit", f"its balloon is {format_size(reached)}"), **_IDLE)
    if reached != size:
        raise GuestShort(f"the guest gave up {reached} of {size} bytes in {timeout:g} s", reached, machine=row.name, hint=_GIVES)
    return reached


def reclaim(context: Context, row: Row, files: Callable[[], Files], size: int | None) -> int:
    """Take memory back that a machine holds and does not need. Raises HostLacks, UnsupportedByWall."""
    if row.spec.wall == "vm":
        return _deflated(context, row, files, size)
    group = Cgroup.find(context.home, row.id)
    use = group.memory() if group is not None else None
    if group is None or use is None:
        raise HostLacks("memory cannot be reclaimed on this host", machine=row.name, hint="`trivisor doctor` says why")
    return group.reclaim(use.used if size is None else size)


def _deflated(context: Context, row: Row, files: Callable[[], Files], size: int | None) -> int:
    """Have a guest drop files that it read; a balloon then takes what is free, which goes back to the host, and gives it back empty."""
    if row.state is not State.RUNNING:
        raise InvalidState(row.name, row.state.value, "limit", [State.RUNNING.value])
    engine = context.engine(row.spec.wall, row.name)
    growth = _growth(context, row, "be reclaimed from")
    sizes = growth.sizes()
    before = engine.usage(context.box(row))
    growth.balloon(sizes.balloon, TIMEOUT)
    files().write("/proc/sys/vm/drop_caches", b"1\n")
    free = min(_free(files) or 0, sizes.base - sizes.balloon) - 2 * _MARGIN
    if free > 0:
        growth.balloon(sizes.balloon + (free if size is None else min(size, free)) // _PAGE * _PAGE, TIMEOUT)
        growth.balloon(sizes.balloon, TIMEOUT)
    after = engine.usage(context.box(row))
    # RAM that a daemon maps, too, counts as shared.
    return max(0, before.private + before.shared - after.private - after.shared)


def has(context: Context, row: Row) -> int:
    """Return how much memory a machine that is alive may have now."""
    engine = context.engine(row.spec.wall, row.name)
    return engine.growth(context.box(row)).sizes().now if isinstance(engine, Growable) else row.spec.memory


@contextmanager
def _operation(context: Context, machine: str, verb: str) -> Iterator[Row]:
    """What was refused, by us or by a guest, was not cut short: the machine is as its record says."""
    with life.operation(context, machine, verb) as row:
        try:
            thawing.begun(row)
            yield row
        except (CallerError, GuestError, OverBudget):
            context.records.update(machine, **_IDLE)
            raise
        context.records.update(machine, **_IDLE)


def _plan(context: Context, row: Row, wishes: dict[str, Any]) -> Plan:
    """Raises InvalidSpec for what no machine can be, HostLacks for what this host cannot enforce."""
    if "disk" in wishes:
        stretch.check(row, wishes["disk"])
    spec = _with(row.spec, wishes)
    context.engine(spec.wall, row.name).check(spec)
    live = row.state in reconcile.LIVE
    growth = _growth(context, row, "be changed") if live and row.spec.wall == "vm" else None
    changes = []
    for what in ("cpus", "memory", "disk"):
        if what not in wishes:
            continue
        before, after = getattr(row.spec, what), getattr(spec, what)
        why, note = "", ""
        if what == "disk":
            why, note = stretch.not_now(row) if live else "", stretch.note(context, row, after)
        elif growth is not None:
            before, why = _now(growth, what, before, after)
        if before != after or getattr(row.spec, what) != after:
            changes.append(Change(what, before, after, "start" if not live else "restart" if why else "now", why, note))
    if growth is not None and changes and row.state is State.PAUSED:
        raise InvalidState(row.name, row.state.value, "modify", [state.value for state in State if state is not State.PAUSED])
    return Plan(tuple(changes))


def _with(spec: Spec, wishes: dict[str, Any]) -> Spec:
    asked = (*(name for name in spec.asked if name not in wishes), *wishes)
    try:
        return checked(msgspec.convert({**msgspec.structs.asdict(spec), **wishes, "asked": asked}, Spec, strict=True))
    except msgspec.ValidationError as error:
        raise InvalidSpec(f"{error}") from None


def _now(growth: Growth, what: str, before: int, after: int) -> tuple[int, str]:
    """Return what a virtual machine has, and why it cannot have `after` without a restart."""
    if what == "cpus":
        there = growth.cpus()
        return before, f"it was started with {there} vCPUs" if after > there else ""
    sizes = growth.sizes()
    if after < sizes.base:
        return sizes.now, f"it was started with {format_size(sizes.base)}, of which it gives nothing back while it runs"
    most = sizes.base + growth.room()
    return sizes.now, f"it was started with room for {format_size(most)}" if after > most else ""


def _growth(context: Context, row: Row, what: str) -> Growth:
    engine = context.engine(row.spec.wall, row.name)
    if not isinstance(engine, Growable):
        raise UnsupportedByWall(what, row.spec.wall, ["vm"], machine=row.name)
    return engine.growth(context.box(row))


def _carry_out(context: Context, row: Row, changes: Sequence[Change], files: Callable[[], Files], timeout: float) -> None:
    for change in changes:
        spec = _with(row.spec, {change.what: change.after})
        event = ("limit" if change.what == "memory" else "modified", _words(change))
        try:
            if change.when == "now" and change.what == "memory":
                with budget.changing(context, row, int(change.after)):
                    _set_memory(context, msgspec.structs.replace(row, spec=spec), change, files, timeout)
            elif change.when == "now" and change.what == "disk":
                stretch.carry_out(context, row, int(change.after), timeout)
            elif change.when == "now":
                _set_cpus(context, row, spec, timeout)
        except GuestShort:
            # The guest goes on giving back what it can, and its next start has what was asked for.
            context.records.update(row.id, spec=spec, event=event)
            raise
        row = context.records.update(row.id, spec=spec, event=event) or row


def _set_memory(context: Context, row: Row, change: Change, files: Callable[[], Files], timeout: float) -> None:
    size = row.spec.memory
    if row.spec.wall == "vm":
        if size < change.before:
            _spare(row, int(change.before) - size, files)
        _growth(context, row, "be changed").resize(size, timeout)
        return
    group = Cgroup.find(context.home, row.id)
    use = group.memory() if group is not None else None
    if group is None or use is None:
        raise HostLacks("memory cannot be limited on this host", machine=row.name, hint="`trivisor doctor` says why")
    if size < use.fixed:
        raise InvalidSpec(
            f"{size} bytes are less than the {use.fixed} that its programs hold", machine=row.name, hint="end some of them first"
        )
    group.limit_memory(Limits.of(row.spec), context.home, growing=use.limit is not None and size > use.limit)


def _spare(row: Row, size: int, files: Callable[[], Files]) -> None:
    """Raise InvalidSpec if a guest says that it needs what it is to give back."""
    free = _free(files)
    if free is not None and size > free - _MARGIN:
        raise InvalidSpec(f"its programs hold too much: of {size} bytes it can spare {max(0, free - _MARGIN)}", machine=row.name, hint=_END)


def _free(files: Callable[[], Files]) -> int | None:
    with suppress(FileError):
        return available(files().read("/proc/meminfo", 0, _FIGURES_MAX).decode("ascii", "replace"))
    return None


def _set_cpus(context: Context, row: Row, spec: Spec, timeout: float) -> None:
    if row.spec.wall == "vm":
        _growth(context, row, "be changed").bring_up(int(spec.cpus), timeout)
        return
    group = Cgroup.find(context.home, row.id)
    if group is None or not group.limit_cpus(Limits.of(spec), context.home):
        raise HostLacks("processors cannot be limited on this host", machine=row.name, hint="`trivisor doctor` says why")


def _words(change: Change) -> str:
    def word(value: int | float) -> str:
        return f"{value:g}" if change.what == "cpus" else format_size(int(value))

    when = {"now": "", "start": ", from its next start on", "restart": f", at its next start: {change.why}"}[change.when]
    return f"{change.what} {word(change.before)} to {word(change.after)}{when}{change.note and '; '}{change.note}"
