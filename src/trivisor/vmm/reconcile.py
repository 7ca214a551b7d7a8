"""A record that the world contradicts is put right, by whoever reads it next.

Three things can be wrong with a record. Its operation's process died in the middle (the operation still
stands in the row, and nobody holds the machine's lock): what it began is taken back, a delete is finished.
It says running, but no keeper holds the alive lock: the machine ended, and the exit file says how. Its
owner is dead: then so is a machine whose lifetime was that process's.

All of it happens under the machine's lock, so it never meets an operation of a live process.
"""

from __future__ import annotations

import contextlib
import signal
import stat
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from trivisor.core import process
from trivisor.core.errors import Busy, HostError, StorageError, TrivisorError
from trivisor.core.paths import MachineDir
from trivisor.core.state import State
from trivisor.launch import keeper
from trivisor.launch.net import networks
from trivisor.vmm import fired, limits, locks, plugged
from trivisor.vmm.context import Context, pin_owner
from trivisor.vmm.migration.mover import Mover
from trivisor.vmm.records import Row
from trivisor.vmm.removal import remove_tree
from trivisor.vmm.snapshots import keeping
from trivisor.vos.devices import endpoint
from trivisor.vos.line import Line

LIVE = (State.RUNNING, State.PAUSED)
MAKING = ("create", "clone", "receive")
"""Operations before whose end there is no machine."""
STARTING = ("start", "resume", "restore")
STILL = ("commit",)
"""Operations for which a running machine stands still, to run on after them."""
FREEZING = ("suspend", "snapshot", "fork")
"""Those in which a machine may end, to go on from there."""
MOVING = ("migrate", "handover", "arrive")
"""Of a migration: until the machine is given up, until the target said that it runs, and there, since it may run."""
GIVEN_UP = "it was given up to another home, which did not say that it runs there"
_PANIC = b"Kernel panic"
_OOM = "out of memory"
"""Also the keeper's word for it."""
_TAIL = 64 << 10


def settle(context: Context, row: Row) -> Row | None:
    """Return the record put right, or as it stands while a live process operates; None if the machine is gone."""
    return settled(context, row)[1]


def settled(context: Context, row: Row) -> tuple[Row | None, Row | None]:
    """The same, after the record as it stood before: between a caller's reading and here an operation may have ended."""
    if not _doubtful(context, row):
        return row, row
    try:
        with locks.hold(context.folder(row).lock, locks.SETTLE, row.name, make=False):
            fresh = context.records.row(row.id)
            return fresh, fresh and _held(context, fresh)
    except Busy:
        fresh = context.records.row(row.id)
        return fresh, fresh
    except locks.FolderGone:
        fresh = context.records.row(row.id)
        return fresh, fresh and _settle_without_folder(context, fresh)


def settle_held(context: Context, machine: str) -> Row | None:
    """The same for a caller that holds the machine's lock. Raises Busy while another process makes it."""
    row = context.records.row(machine)
    return row and _held(context, row)


def _held(context: Context, row: Row) -> Row | None:
    if row.operation in MAKING and row.operator is not None and row.operator.alive():
        # Between its row and its lock, taking back a failed create, or waiting for its brothers: not ours to touch.
        raise Busy(row.name, row.operation)
    if row.owner is not None and not row.owner.alive():
        erase(context, row, "deleted", "the process that it belonged to ended")
        return None
    if row.operation:
        recovered = _recover(context, row)
        if recovered is None:
            return None
        row = recovered
    if row.state in LIVE and not keeper.alive(context.folder(row)):
        return ended(context, row)
    return row


def erase(context: Context, row: Row, kind: str = "deleted", detail: str = "") -> None:
    """Remove a machine with all it has: processes, folder, pin, row, in that order. May be done again."""
    folder = context.folder(row)
    keeper.kill(folder)
    limits.clear(context, row)
    _leave(context, row)
    remove_tree(folder.root)
    context.images.unpin(pin_owner(row.id))
    context.disks.unpin(pin_owner(row.id))
    context.records.remove(row, (kind, detail))
    keeping.release(context, keeping.needed(row))


def ended(context: Context, row: Row) -> Row | None:
    """Write down how a machine's last life ended, and end the operation that asked for it."""
    folder = context.folder(row)
    rebooted = bool(row.boot_id) and row.boot_id != process.boot_id()
    killed = limits.close(context, row)
    verdict = judge(keeper.ended(folder), rebooted=rebooted, panic=_panic(folder) or fired.killed(folder, row.started), killed=killed)
    clear_sockets(folder)
    _leave(context, row)
    done = _put_right(
        context,
        row,
        (verdict.state.value, verdict.reason),
        state=verdict.state,
        status=verdict.status,
        reason=verdict.reason,
        ended=verdict.time or time.time(),
        operation="",
        operator=None,
        granted=0,
        ice="",
        base=(base := rests(context, row)),
    )
    keeping.release(context, keeping.needed(row) - {*base.split()})
    return done


def rests(context: Context, row: Row) -> str:
    """Return what frozen machines one needs that runs no more: those over which its own layer lies, if its wall has it so."""
    return row.base if getattr(context.engines.get(row.spec.wall), "lies_over_frozen", False) else ""


def _put_right(context: Context, row: Row, event: tuple[str, str], **changes: Any) -> Row | None:
    """Write down what a record should say. Where the disk has no room the answer is right all the same, and a later reader writes it."""
    try:
        return context.records.update(row.id, event=event, **changes)
    except StorageError:
        return msgspec.structs.replace(row, **changes)


def _leave(context: Context, row: Row) -> None:
    """Have nobody look for a machine any more, on its networks or at its serial ports."""
    for path in plugged.sockets(context.folder(row).root):
        endpoint.forget(path)
    for network in {row.spec.network, *(link.network for link in plugged.links(context.folder(row).root))}:
        networks.leave(context.home, network, row.name)


@dataclass(frozen=True)
class Verdict:
    """How a life ended. `time` is seconds since the epoch, None where nobody saw it."""

    state: State
    status: int | None
    reason: str
    time: float | None = None


def judge(ending: keeper.Exit | None, *, rebooted: bool, panic: str, killed: bool = False) -> Verdict:
    """Decide between stopped and failed, and give the reason in words. `killed`: the kernel killed something in it for want of memory."""
    if ending is None:
        return Verdict(State.FAILED, None, "the host rebooted" if rebooted else "its keeper was killed")
    at = ending.ended
    if ending.bye is not None:
        return Verdict(State.STOPPED, ending.bye, ending.reason or "the guest powered off", at)
    if ending.reason == _OOM or (killed and not ending.reason and (ending.how, ending.value) == ("signaled", signal.SIGKILL)):
        return Verdict(State.FAILED, None, _OOM, at)
    if ending.reason:
        return Verdict(State.STOPPED, None, ending.reason, at)
    if panic:
        return Verdict(State.FAILED, None, panic, at)
    if ending.how == "exited" and ending.value == 0:
        return Verdict(State.STOPPED, None, "the guest powered off at once", at)
    how = "was killed by signal" if ending.how == "signaled" else "exited with status"
    return Verdict(State.FAILED, None, f"its engine {how} {ending.value}", at)


def clear_sockets(folder: MachineDir) -> None:
    """Remove the sockets that a dead keeper and engine left in a machine's folder."""
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.root.iterdir():
            if stat.S_ISSOCK(entry.lstat().st_mode):
                entry.unlink(missing_ok=True)


def standing(context: Context, row: Row) -> State:
    """Return whether a machine that is alive runs or is paused, from the engine itself."""
    try:
        return State.PAUSED if context.engine(row.spec.wall, row.name).paused(context.box(row)) else State.RUNNING
    except HostError:
        # An engine that does not answer is about to be found dead, or hangs: either way as it was before. One that was given up stood
        # still, whatever its record says: who takes it to run would not look for it where it may run.
        return State.PAUSED if row.operation == "handover" else row.state


def _doubtful(context: Context, row: Row) -> bool:
    if row.operation or (row.owner is not None and not row.owner.alive()):
        return True
    return row.state in LIVE and not keeper.alive(context.folder(row))


def _recover(context: Context, row: Row) -> Row | None:
    """Take back, or finish, the operation whose process died. The machine's lock is held."""
    folder = context.folder(row)
    if row.operation in (*MAKING, "delete") or (row.operation == "arrive" and not _answered(context, row)):
        # Nobody was told that it runs here, so it is where it came from.
        erase(context, row, "swept", f"{row.operation} was cut short")
        return None
    state, ice = row.state, row.ice
    if row.operation in FREEZING and row.ice and keeper.alive(folder):
        standing(context, row)  # what was begun may be about to end it, and answers when it has
    if row.operation in STARTING and row.state not in LIVE:
        # The record of a start is its last step, so whatever runs now was never reported as running.
        end(context, row)
    elif keeper.alive(folder):
        state = _moved(context, row) if row.operation in MOVING else _run_on(context, row, standing(context, row))
        ice = ""
    elif row.operation in FREEZING and row.ice and row.boot_id == process.boot_id() and keeping.settle(context, row.ice):
        # Its end was the last step of its freezing: whoever was to write that down died.
        end(context, row)
        state = State.SUSPENDED
    granted = row.granted if state is State.RUNNING else 0
    said = ("swept", f"{row.operation} was cut short")
    reason = GIVEN_UP if row.operation == "handover" and state is State.PAUSED else row.reason
    done = _put_right(context, row, said, state=state, reason=reason, operation="", operator=None, granted=granted, ice=ice)
    if ice != row.ice:
        keeping.release(context, {row.ice})
    return done


def _run_on(context: Context, row: Row, state: State) -> State:
    """Have a machine that stands still for nothing but the operation that was cut short run on; return its state."""
    if state is not State.PAUSED or row.state is not State.RUNNING or row.operation not in STILL:
        return state
    with contextlib.suppress(HostError):
        context.engine(row.spec.wall, row.name).resume(context.box(row))
    return standing(context, row)


def _answered(context: Context, row: Row) -> bool:
    """Whether a machine's keeper has heard of its guest: before that, it ends it when it is left alone."""
    folder = context.folder(row)
    if not keeper.alive(folder):
        return False
    try:
        with contextlib.closing(Line.connect(folder.line, row.name)) as line:
            return line.keeper_info().get("synced") == "1"
    except TrivisorError:
        return False


def _moved(context: Context, row: Row) -> State:
    """Have a machine run here if nobody else can be told to run it; return its state."""
    engine = context.engine(row.spec.wall, row.name)
    with contextlib.suppress(HostError):
        if row.operation == "arrive":
            engine.resume(context.box(row))
        elif row.operation == "migrate" and isinstance(engine, Mover):
            engine.departure(context.box(row)).abandon()
    return standing(context, row)


def end(context: Context, row: Row) -> None:
    """Clear away what ran of a life that nobody was told of."""
    folder = context.folder(row)
    keeper.kill(folder)
    limits.close(context, row)
    clear_sockets(folder)
    _leave(context, row)


def _settle_without_folder(context: Context, fresh: Row) -> Row | None:
    """There is nothing to lock: the row is before its folder (create), after it (delete), or something was taken away."""
    if fresh.operator is not None and fresh.operator.alive():
        return fresh
    orphan = fresh.owner is not None and not fresh.owner.alive()
    if orphan or fresh.operation in ("create", "delete"):
        erase(context, fresh, "swept", f"{fresh.operation} was cut short" if fresh.operation else "")
        return None
    if context.folder(fresh).root.is_dir():  # it was the lock's file that was taken away
        try:
            with locks.hold(context.folder(fresh).lock, locks.SETTLE, fresh.name):
                return settle_held(context, fresh.id)
        except (Busy, locks.FolderGone):
            return context.records.row(fresh.id)
    lost: dict[str, Any] = {"state": State.FAILED, "reason": "its folder is gone", "operation": "", "operator": None, "granted": 0}
    return _put_right(context, fresh, ("failed", "its folder is gone"), **lost)


def _panic(folder: MachineDir) -> str:
    """Return the kernel's last words from the serial log, or nothing. Hostile text: bounded and made printable."""
    try:
        with folder.log("serial").open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _TAIL))
            tail = log.read(_TAIL)
    except OSError:
        return ""
    at = tail.find(_PANIC)
    if at < 0:
        return ""
    line = tail[at : at + 200].splitlines()[0].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in line)
