"""The verbs that change a machine, each a short list of steps that can be taken back.

A verb holds the machine's lock, has the record put right, checks the state, writes itself down as the row's
operation, acts, and ends the operation in the same transaction that records the new state. If it fails it
takes back what it did; if its process dies, the standing operation tells the next reader (reconcile.py).
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from trivisor.core import process
from trivisor.core.errors import AlreadyExists, Busy, HostError, InvalidSpec, NotFound, StorageError, TrivisorError
from trivisor.core.process import Who
from trivisor.core.spec import PASSING, Spec
from trivisor.core.state import State, check
from trivisor.core.undo import Undo
from trivisor.images.catalog import Image
from trivisor.launch import keeper
from trivisor.launch.net import provide
from trivisor.vmm import budget, devices, limits, locks, reconcile, removal, shares
from trivisor.vmm.context import Context, pin_owner
from trivisor.vmm.engine import Progress
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots import keeping, thawing

_FORCE_WAIT = 15.0
_KEEPER_LATE = 10.0
"""Seconds that a keeper has to end after the grace of its guest."""
_IDLE: dict[str, Any] = {"operation": "", "operator": None}


def create(context: Context, spec: Spec, image: Image) -> Row:
    """Make a machine: its row, its image's pin, its folder, its disk. All of it or nothing."""
    with Undo() as undo:
        row = make(context, spec, image, undo, "create", {})
        done = context.records.update(row.id, durable=row.owner is None, event=("created", spec.image), **_IDLE)
        undo.keep()
    return done or row


def make(context: Context, spec: Spec, image: Image, undo: Undo, operation: str, more: dict[str, Any]) -> Row:
    """Make a machine that stays in the hands of `operation` (one of reconcile.MAKING), which ends it, or takes back what `undo` names.

    `more` is written down of it as well.
    """
    me = Who.me()
    row = Row(
        id=secrets.token_hex(6),
        name=spec.name,
        slot=0,
        spec=spec,
        digest=image.digest,
        state=State.CREATED,
        operation=operation,
        operator=me,
        owner=me if spec.lifetime == "process" else None,
        created=time.time(),
        **more,
    )
    folder = context.folder(row)
    undo.add("row", lambda: context.records.remove(row))
    row = _add(context, row)
    undo.add("pin", lambda: context.images.unpin(pin_owner(row.id)))
    context.images.pin(image, pin_owner(row.id), durable=row.owner is None)
    undo.add("folder", lambda: removal.remove_tree(folder.root))
    _make_folder(context, row)
    with locks.hold(folder.lock, operation, row.name):
        shares.prepare(context.home, spec.volumes)
        context.engine(spec.wall, row.name).create(context.box(row), undo)
    return row


def start(context: Context, machine: str, progress: Progress, verb: str = "start") -> Row:
    """Run the machine until its guest answers: from the beginning, or from what it was frozen in."""
    with operation(context, machine, verb) as row, Undo() as undo:
        undo.add("record", lambda: context.records.update(row.id, state=row.state, granted=0, **_IDLE))
        done = launch(context, row, undo, progress, ("started" if verb == "start" else "resumed", ""))
        undo.keep()
        return done


def launch(context: Context, row: Row, undo: Undo, progress: Progress, event: tuple[str, str], *, base: str = "", idle: bool = True) -> Row:
    """Run a machine that the caller holds, and write that down, with the end of the operation if it is `idle` then.

    `base` is the frozen machine that it is made of from now on, if that changed.
    """
    engine = context.engine(row.spec.wall, row.name)
    squashed = context.images.passing_rootfs if PASSING in row.spec.labels else context.images.rootfs
    derive = squashed if row.spec.wall == "vm" else context.images.lowers
    derive(row.digest, progress)
    box = context.box(row)
    shares.prepare(context.home, row.spec.volumes)
    budget.admit(context, row.id, row.spec.memory)
    _clear(context, row)
    limits.clear(context, row)
    undo.add("cgroup", lambda: limits.clear(context, row))
    undo.add("sockets", lambda: reconcile.clear_sockets(box.dir))
    undo.add("keeper", lambda: keeper.kill(box.dir))
    facts = thawing.thaw(context, row, box, undo, progress) if row.ice else engine.start(box, undo, progress)
    provide.settle(row.spec)
    devices.restore(context, row)
    life: dict[str, Any] = {"started": time.time(), "ended": None, "status": None, "reason": "", "facts": facts, "oom_kills": 0}
    life |= {"ice": "", "base": row.ice or base or row.base, **(_IDLE if idle else {})}
    done = context.records.update(row.id, state=State.RUNNING, boot_id=process.boot_id(), event=event, **life) or row
    keeping.release(context, keeping.needed(row) - {life["base"]})
    return done


def pause(context: Context, machine: str) -> Row:
    """Freeze the machine: when this returns no guest instruction runs."""
    with operation(context, machine, "pause") as row:
        context.engine(row.spec.wall, row.name).pause(context.box(row))
        return context.records.update(row.id, state=State.PAUSED, granted=0, event=("paused", ""), **_IDLE) or row


def resume(context: Context, machine: str) -> Row:
    with operation(context, machine, "resume") as row:
        budget.admit(context, row.id, row.spec.memory)
        context.engine(row.spec.wall, row.name).resume(context.box(row))
        return context.records.update(row.id, state=State.RUNNING, event=("resumed", ""), **_IDLE) or row


def stop(context: Context, machine: str, timeout: float) -> Row:
    """Have the guest power off, and kill it when `timeout` seconds were not enough."""
    if not (0 <= timeout < math.inf):
        raise InvalidSpec(f"timeout must be seconds, 0 or more, not {timeout!r}", machine=machine)
    with operation(context, machine, "stop") as row:
        if row.state is State.SUSPENDED:
            said: dict[str, Any] = {"reason": "its memory was dropped", "status": None, "ended": time.time(), "ice": ""}
            said["base"] = reconcile.rests(context, row)
            done = context.records.update(row.id, state=State.STOPPED, event=("stopped", said["reason"]), **said, **_IDLE)
            keeping.release(context, keeping.needed(row) - {*said["base"].split()})
            return done or row
        grace = timeout
        if row.state is State.PAUSED and not grace:
            limits.killable(context, row)
        elif row.state is State.PAUSED:
            try:
                # A frozen guest cannot power itself off.
                context.engine(row.spec.wall, row.name).resume(context.box(row))
            except HostError:
                grace = 0
        keeper.stop(context.folder(row), grace=grace, reason="stop", timeout=grace + _KEEPER_LATE)
        return reconcile.ended(context, row) or row


def delete(context: Context, machine: str, *, force: bool = False) -> None:
    """Remove the machine and all it holds. `force` first ends whatever it is doing."""
    row = context.row(machine)
    folder = context.folder(row)
    if not folder.root.exists():
        if row.operation in reconcile.MAKING and row.operator is not None and row.operator.alive():
            raise Busy(row.name, row.operation)
        # Something took the folder away; the lock still needs one.
        _make_folder(context, row)
    with ExitStack() as stack:
        dying = stack.enter_context(ExitStack())
        if force:
            _kill_and_hold(context, row, stack, dying)
            fresh = context.records.row(row.id)
        else:
            stack.enter_context(locks.hold(folder.lock, "delete", row.name))
            fresh = reconcile.settle_held(context, row.id)
            if fresh is not None:
                check(fresh.name, fresh.state, "delete")
        if fresh is None:
            dying.close()
            removal.remove_tree(folder.root)
            return
        try:
            context.records.update(row.id, durable=row.owner is None, operation="delete", operator=Who.me())
        except StorageError:
            dying.close()
            # A full disk cannot take the note; deleting the folder is what makes room for the rest. Emptied first: the kernel may
            # hold a removed file for a second, until it has taken down the dead engine's mounts.
            with suppress(OSError):
                os.truncate(folder.disk, 0)
            removal.remove_tree(folder.root)
        dying.close()
        reconcile.erase(context, fresh)


@contextmanager
def operation(context: Context, machine: str, verb: str) -> Iterator[Row]:
    """Hold the machine for `verb` with its record put right and its state checked.

    The body ends the operation itself, with the state it leads to. If it fails the machine is left as the
    world says it is. Raises NotFound, Busy, InvalidState.
    """
    row = context.row(machine)
    with locks.hold(context.folder(row).lock, verb, row.name):
        settled = reconcile.settle_held(context, machine)
        if settled is None:
            raise NotFound(f"machine {row.name} is gone", machine=row.name, hint="it was deleted meanwhile")
        check(settled.name, settled.state, verb)
        current = context.records.update(machine, operation=verb, operator=Who.me())
        try:
            yield current or settled
        except BaseException as error:
            try:
                reconcile.settle_held(context, machine)
            except TrivisorError as failure:
                error.add_note(f"and its record could not be put right: {failure}")
            raise


def _add(context: Context, row: Row) -> Row:
    try:
        return context.records.add(row)
    except AlreadyExists:
        # The name may be held by what a crash left, or by a machine whose owner is dead.
        for other in context.records.find(row.name):
            if other.name != row.name or reconcile.settle(context, other) is not None:
                raise
        return context.records.add(row)


def _make_folder(context: Context, row: Row) -> None:
    folder = context.folder(row)
    try:
        folder.root.mkdir(mode=0o700, exist_ok=True)
        folder.logs.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder.root} cannot be made: {error.strerror}", machine=row.name, hint="free space under the home") from error


def _clear(context: Context, row: Row) -> None:
    """Remove what the last life left: its sockets, its exit file, and its logs, which would be taken for this one's."""
    folder = context.folder(row)
    try:
        reconcile.clear_sockets(folder)
        folder.exit.unlink(missing_ok=True)
        folder.keeper.unlink(missing_ok=True)
        folder.logs.mkdir(mode=0o700, exist_ok=True)
        for log in folder.logs.iterdir():
            log.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder.root} cannot be used: {error.strerror}", machine=row.name) from error


def _kill_and_hold(context: Context, row: Row, stack: ExitStack, dying: ExitStack) -> None:
    """Take the lock from whatever operation holds it, by killing what that works on until it gives up.

    What was killed may still be ending: it has when `dying` is closed, before which nothing of the machine may be taken away.
    """
    folder = context.folder(row)
    dying.enter_context(keeper.killing(folder))
    with suppress(Busy):  # mostly nobody holds it
        stack.enter_context(locks.hold(folder.lock, "delete", row.name))
        return
    dying.close()
    deadline = time.monotonic() + _FORCE_WAIT
    while True:
        keeper.kill(folder)
        try:
            stack.enter_context(locks.hold(folder.lock, "delete", row.name, wait=0.2))
            return
        except Busy:
            if time.monotonic() > deadline:
                raise
