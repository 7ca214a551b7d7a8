"""snapshot, restore, fork, suspend, and create from a snapshot.

Each holds the machine as any verb does (life.py). What is frozen is written down before it is made; a machine names what it needs in
its own row, before it needs it, and lets go of what it needed after that.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import msgspec

from trivisor.core import spec as specs
from trivisor.core.errors import AlreadyExists, InvalidSpec, NotFound
from trivisor.core.spec import Spec
from trivisor.core.state import State, check
from trivisor.core.undo import Undo
from trivisor.images.catalog import Image
from trivisor.launch import keeper
from trivisor.vmm import budget, life, reconcile
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Progress
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import keeping, model, packed, table, thawing, upkeep
from trivisor.vmm.snapshots.model import About, Kept, Kind

_IDLE: dict[str, Any] = {"operation": "", "operator": None}
_AT_ONCE = 2
_NAME_TRIES = 10_000
_LATE = 10.0
MOST = 1000
"""Machines of one fork."""


def snapshot(context: Context, machine: str, name: str, about: About, *, memory: bool | None, ttl: float | None, keep: bool) -> Kept:
    """Freeze a machine under a name; it goes on. Raises what Machine.snapshot raises."""
    model.check_name(name)
    model.check_words(about.note, about.tags)
    with Undo() as undo:
        with life.operation(context, machine, "snapshot") as row:
            whole = _with_memory(context, row, memory)
            about = msgspec.structs.replace(about, memory=whole)
            expires = keeping.until(ttl) if ttl is not None else None
            kept = keeping.begin(context, row, Kind.SNAPSHOT, ref=f"{row.name}@{name}", about=about, expires=expires, keep=keep)
            undo.add("frozen", partial(keeping.drop, context, kept.id))
            about = _freeze(context, row, kept)
            context.records.update(row.id, **_IDLE)
        about = packed.keep(context, kept, about)
        undo.add("packed", lambda: None)
        done = keeping.finish(context, kept, about)
        undo.keep()
    context.records.update(row.id, ancestor=kept.id, event=("snapshot", done.ref or ""))
    upkeep.hold(context, kept.id)
    return done


def restore(context: Context, machine: str, name: str, progress: Progress) -> Row:
    """Have a machine be what it was. Raises what Machine.restore raises."""
    with life.operation(context, machine, "restore") as row:
        kept = named(context, name, row)
        spec = _as_it_was(row, kept)
        changed = msgspec.structs.replace(row, spec=spec)
        engine = thawing.freezer(context, spec.wall, row.name, "go on from a snapshot", memory=kept.about.memory)
        engine.fits(context.box(changed), kept.about.needs)
        context.engine(spec.wall, row.name).check(spec)
        before = keeping.needed(row)
        needs = " ".join(dict.fromkeys([kept.id, *before]))
        # Named first, so that its folder stays there.
        context.records.update(row.id, base=needs)
        try:
            _still_there(context, kept, row)
            packed.ready(context, kept)
            budget.admit(context, row.id, spec.memory)
        except BaseException:
            context.records.update(row.id, base=row.base)
            raise
        state: dict[str, Any] = {"state": State.FAILED, "reason": f"its restore from {kept.ref} was cut short"}
        ice = kept.id if kept.about.memory else ""
        # From here on it is not what it was; a start goes on with this.
        current = context.records.update(row.id, durable=True, base=needs, ice=ice, spec=spec, ancestor=kept.id, **state) or changed
        if row.state in reconcile.LIVE:
            keeper.stop(context.folder(row), grace=0, reason="restore", timeout=_LATE)
        with Undo() as undo:
            if not kept.about.memory:
                engine.refill(context.box(current), keeping.plain(context, kept.id), undo)
                thawing.used(context, kept)
            done = life.launch(context, current, undo, progress, ("restored", kept.ref or ""), base=kept.id)
            undo.keep()
        keeping.release(context, before - {kept.id})
        return done


def create(context: Context, kept: Kept, spec: Spec) -> Row:
    """Make a machine that begins where a snapshot is. Raises what VMM.create raises."""
    engine = thawing.freezer(context, spec.wall, spec.name, "go on from a snapshot", memory=kept.about.memory)
    with Undo() as undo:
        row = _make(context, kept, spec, undo, "create")
        engine.fits(context.box(row), kept.about.needs)
        packed.ready(context, kept)
        if not kept.about.memory:
            engine.refill(context.box(row), keeping.plain(context, kept.id), undo)
            thawing.used(context, kept)
        done = context.records.update(row.id, durable=row.owner is None, event=("created", kept.ref or ""), **_IDLE)
        undo.keep()
    return done or row


def fork(context: Context, machine: str, number: int, names: Sequence[str] | None, progress: Progress) -> list[Row]:
    """Make running copies of a machine. Raises what Machine.fork raises."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MOST:
        raise InvalidSpec(f"a fork makes 1 to {MOST} machines, not {number!r}")
    if names is not None and (len(names) != number or len(set(names)) != number):
        raise InvalidSpec(f"{number} machines need {number} names, each its own")
    with Undo() as undo:
        with life.operation(context, machine, "fork") as row:
            memory = thawing.with_memory(context.engine(row.spec.wall, row.name))
            engine = thawing.freezer(context, row.spec.wall, row.name, "be forked")
            kept = keeping.begin(context, row, Kind.FORK, about=About(memory=memory))
            undo.add("frozen", partial(keeping.drop, context, kept.id))
            about = _freeze(context, row, kept, lasting=False)
            table.update(context.records, kept.id, about=about)
            context.records.update(row.id, event=("forked", f"into {number}"), **_IDLE)
        kept = msgspec.structs.replace(kept, about=about)
        made = []
        for spec in _children(context, row.spec, number, names):
            child = _make(context, kept, spec, undo, "clone")
            undo.add("child", partial(reconcile.erase, context, child))
            made.append(child)
        if not memory:
            for child in made:
                engine.refill(context.box(child), keeping.plain(context, kept.id), undo)
        with ThreadPoolExecutor(_AT_ONCE) as crew:
            jobs = [crew.submit(_run, context, child, kept, progress) for child in made]
            failed = [error for job in jobs if (error := job.exception()) is not None]
        if failed:
            raise failed[0]
        done = [context.records.update(child.id, durable=child.owner is None, **_IDLE) or child for child in made]
        undo.keep()
    table.update(context.records, kept.id, maker=None)
    return done


def suspend(context: Context, machine: str) -> Row:
    """Have a machine stand still on the disk alone. Raises what Machine.suspend raises."""
    with life.operation(context, machine, "suspend") as row:
        thawing.freezer(context, row.spec.wall, row.name, "be suspended", memory=True)
        kept = keeping.begin(context, row, Kind.SUSPEND, about=About(memory=True))
        try:
            # Before it is frozen, so that it is found if we die when it has been: its end is the last step of that (reconcile.py).
            context.records.update(row.id, ice=kept.id)
            about = _freeze(context, row, kept, ends=True)
        except BaseException:
            context.records.update(row.id, ice="")
            keeping.drop(context, kept.id)
            raise
        keeping.finish(context, kept, about)
        reconcile.end(context, row)
        event = ("suspended", "")
        return context.records.update(row.id, durable=True, state=State.SUSPENDED, granted=0, event=event, **_IDLE) or row


def named(context: Context, key: str, row: Row | None = None) -> Kept:
    """Return the snapshot that is meant: "machine@name", of `row` its name alone, or an id's beginning. Raises NotFound."""
    keys = [f"{row.name}@{key}"] if row is not None and "@" not in key else []
    for one in (*keys, key):
        there = [kept for kept in table.find(context.records, one) if kept.listed and not keeping.expired(kept)]
        if len(there) == 1:
            return there[0]
    raise NotFound(f"there is no snapshot {keys[0] if keys else key!r}", hint="`trivisor snapshots` lists those there are")


def _with_memory(context: Context, row: Row, wish: bool | None) -> bool:
    """Decide whether memory is frozen. Raises InvalidState, InvalidSpec, UnsupportedByWall."""
    thawing.begun(row)
    live = row.state in reconcile.LIVE
    if wish is None:
        wish = live and thawing.with_memory(context.engine(row.spec.wall, row.name))
    thawing.freezer(context, row.spec.wall, row.name, "freeze a machine's memory" if wish else "freeze machines", memory=wish)
    if wish:
        check(row.name, row.state, "snapshot with memory")
    return wish


def _freeze(context: Context, row: Row, kept: Kept, *, ends: bool = False, lasting: bool = True) -> About:
    """Freeze the machine into the folder of `kept`; return what is known of that."""
    engine = thawing.freezer(context, row.spec.wall, row.name, "freeze machines")
    into, about = keeping.plain(context, kept.id), kept.about
    halted = about.memory and not ends and getattr(engine, "ends_frozen", False)
    if halted:  # then it is suspended, if we die before it goes on (reconcile.py)
        context.records.update(row.id, ice=kept.id)
    try:
        frozen = engine.freeze(
            context.box(row), into, memory=about.memory, ends=ends, lasting=lasting, quiesce=about.quiesced, progress=lambda _: None
        )
    finally:
        if halted:
            context.records.update(row.id, ice=row.ice)
    return keeping.about(kept, needs=dict(frozen.needs), paused=frozen.paused, facts=dict(frozen.facts))


def _make(context: Context, kept: Kept, spec: Spec, undo: Undo, operation: str) -> Row:
    """Make a machine that needs `kept`, still in the hands of `operation`. Raises NotFound if `kept` went meanwhile."""
    ancestor = kept.id if kept.kind is Kind.SNAPSHOT else kept.parent
    more = {"base": kept.id, "ice": kept.id if kept.about.memory else "", "ancestor": ancestor}
    row = life.make(context, spec, Image(kept.spec.image, kept.digest, keeping.plain(context, kept.id), 0, 0.0, ""), undo, operation, more)
    _still_there(context, kept, row)
    return row


def _still_there(context: Context, kept: Kept, row: Row) -> None:
    """Now that a machine names it nobody removes it; was it there until now?"""
    found = table.get(context.records, kept.id)
    if found is None or found.kind is Kind.GONE:
        raise NotFound(f"the snapshot {kept.ref or kept.id} is gone", machine=row.name, hint="it was removed meanwhile")


def _run(context: Context, row: Row, kept: Kept, progress: Progress) -> None:
    """Have a copy run, in its own hands still."""
    with Undo() as undo:
        life.launch(context, row, undo, progress, ("forked", f"from {kept.name}"), idle=False)
        undo.keep()


def _as_it_was(row: Row, kept: Kept) -> Spec:
    """Return what a machine is asked to be after a restore: what it was then, by the name and for the time that it has now."""
    if kept.spec.wall != row.spec.wall or kept.digest != row.digest:
        hint = f'make one: create(snapshot="{kept.ref}")'
        raise InvalidSpec(f"{kept.ref} is of another wall or image than {row.name}", machine=row.name, hint=hint)
    now = row.spec
    return specs.checked(
        msgspec.structs.replace(
            kept.spec, name=now.name, labels=now.labels, lifetime=now.lifetime, ttl=now.ttl, idle=now.idle, ports=now.ports
        )
    )


def _children(context: Context, spec: Spec, number: int, names: Sequence[str] | None) -> list[Spec]:
    """Return what each copy is asked to be: a name of its own, host ports of its own."""
    taken = {row.name for row in context.records.rows()}
    if names is None:
        stem = spec.name[: 63 - 6].rstrip("-")
        free = (name for at in range(1, _NAME_TRIES) if (name := f"{stem}-{at}") not in taken)
        names = [next(free) for _ in range(number)]
    elif clash := sorted(taken & set(names)):
        raise AlreadyExists(f"there is a machine named {clash[0]}", machine=clash[0], hint="give another name, or delete it")
    own = free_ports(list(spec.ports.values()) * number)
    each = len(spec.ports)
    ports = [dict(own[at * each : (at + 1) * each]) for at in range(number)]
    return [specs.checked(msgspec.structs.replace(spec, name=name, ports=mine)) for name, mine in zip(names, ports, strict=True)]


def free_ports(guest: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each of these ports of machines one of this host that nobody listens on, and itself."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in guest]
        return [(listener.getsockname()[1], port) for listener, port in zip(listeners, guest, strict=True)]
