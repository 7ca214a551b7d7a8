"""A machine's control groups as its record sees them: kills for want of memory are written down, ends take the groups away.

No process of ours waits for the kernel to kill one: who asks for a machine, for events, or finds it ended compares the
kernel's count with the record's. So a kill is written down once, by whoever sees it first, whenever that is. (With oom="stop" the machine's
end is the kernel's or the keeper's doing, at once.)

What the kernel of a virtual machine kills it says on the console, in whose log it is counted: to be believed as far as the guest is.
"""

from __future__ import annotations

import re
import time

from trivisor.core.errors import HostError
from trivisor.core.state import State
from trivisor.launch import cgroups
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm import fired, refused
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row

_CONSOLE_WAIT = 5.0
_LOG_MAX = 8 << 20
_KILLED = re.compile(r"[Oo]ut of memory: Killed process \d{1,10} \((.{1,15})\) total-vm:")
"""__oom_kill_process() in mm/oom_kill.c."""


def note(context: Context, row: Row) -> Row:
    """Write down what the kernel killed in the machine since the record was last compared; return the record as it is now."""
    row = fired.note(context, row)
    refused.note(context, row)
    group = Cgroup.find(context.home, row.id)
    killed = group.counters().oom_kills if group is not None else 0
    said = _said(context, row) if row.spec.wall == "vm" else []
    if max(killed, len(said)) <= row.oom_kills:
        return row
    whom = group.victims if group is not None and killed >= len(said) else lambda count: said[-count:]
    return context.records.count_oom(row.id, max(killed, len(said)), whom) or row


def await_console(context: Context, row: Row, killed: int) -> None:
    """Write down what a guest says that its kernel killed: with names, if its console's word for it comes in time."""
    deadline = time.monotonic() + _CONSOLE_WAIT
    # The keeper reads the console, and tells nobody when.
    while note(context, row).oom_kills < killed:
        if time.monotonic() > deadline:
            context.records.count_oom(row.id, killed, lambda _: ())
            return
        time.sleep(0.01)


def _said(context: Context, row: Row) -> list[str]:
    """Return the names of what a guest's kernel killed, as its console says."""
    try:
        with context.folder(row).log("serial").open("rb") as log:
            said = log.read(_LOG_MAX).decode("ascii", "replace")
    except OSError:
        return []
    return ["".join(letter if letter.isprintable() else "?" for letter in name) for name in _KILLED.findall(said)]


def note_all(context: Context) -> None:
    """The same for every machine that runs."""
    for row in context.records.rows():
        if row.state in (State.RUNNING, State.PAUSED):
            note(context, row)


def clear(context: Context, row: Row) -> None:
    """Take away the groups of a life that ended. Raises EngineError if a process in them cannot be killed."""
    cgroups.remove(context.home, row.id)


def close(context: Context, row: Row) -> bool:
    """Write down what the kernel killed, and take the groups away; say whether it killed anything in this life.

    What cannot be taken away now is tried again at the next start."""
    killed = row.oom_kills > 0
    try:
        killed = note(context, row).oom_kills > 0
        clear(context, row)
    except HostError as error:
        context.records.note("swept", f"cgroup of {row.name}: left as it is: {error}")
    return killed


def killable(context: Context, row: Row) -> None:
    """Before a frozen machine is killed: a v1 freezer lets nobody die."""
    group = Cgroup.find(context.home, row.id)
    if group is not None:
        group.make_killable()


def stray(context: Context) -> set[str]:
    """Return the machines for which there are groups now. To be asked before the rows are read: a row is older than its groups."""
    return cgroups.names(context.home)


def sweep(context: Context, machine: str) -> list[str]:
    """Take away the groups of a machine that no row names; say so."""
    return cgroups.sweep(context.home, [machine])
