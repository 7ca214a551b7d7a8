"""A machine's control groups as its record sees them: kills for want of memory are written down, ends take the groups away.

No process of ours waits for the kernel to kill one: who asks for a machine, for events, or finds it ended compares the
kernel's count with the record's. So a kill is written down once, by whoever sees it first, whenever that is.
"""

from __future__ import annotations

from trivisor.core.errors import HostError
from trivisor.core.state import State
from trivisor.launch import cgroups
from trivisor.launch.cgroups import Cgroup
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row


def note(context: Context, row: Row) -> Row:
    """Write down what the kernel killed in the machine since the record was last compared; return the record as it is now."""
    group = Cgroup.find(context.home, row.id)
    killed = group.counters().oom_kills if group is not None else 0
    if killed <= row.oom_kills:
        return row
    return context.records.count_oom(row.id, killed) or row


def note_all(context: Context) -> None:
    """The same for every machine that runs."""
    for row in context.records.rows():
        if row.state in (State.RUNNING, State.PAUSED):
            note(context, row)


def clear(context: Context, row: Row) -> None:
    """Take away the groups of a life that ended. Raises EngineError if a process in them cannot be killed."""
    cgroups.remove(context.home, row.id)


def close(context: Context, row: Row) -> None:
    """Write down what the kernel killed, and take the groups away. What cannot be taken away now is tried again at the next start."""
    try:
        note(context, row)
        clear(context, row)
    except HostError as error:
        context.records.note("swept", f"cgroup of {row.name}: left as it is: {error}")


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
