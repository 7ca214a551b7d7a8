"""The states of a machine, and the one table that says which verb is legal in which."""

from __future__ import annotations

from enum import StrEnum

from trivisor.core.errors import InvalidState


class State(StrEnum):
    """Where a machine is in its life (design.md, "A machine's life")."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    FAILED = "failed"


_C, _R, _P, _U, _S, _F = State
LEGAL: dict[str, tuple[State, ...]] = {
    "start": (_C, _S, _F),
    "pause": (_R,),
    "resume": (_P, _U),
    "suspend": (_R, _P),
    "snapshot": (_C, _R, _P, _S, _F),
    "snapshot with memory": (_R, _P),
    "restore": (_R, _P, _S, _F),
    "fork": (_R, _P),
    "stop": (_R, _P, _U),
    "delete": (_C, _U, _S, _F),
    "exec": (_R,),
    "spawn": (_R,),
    "files": (_R,),
    "forward": (_R,),
    "stats": (_R, _P),
    "attach": (_C, _R, _S, _F),
    "detach": (_C, _R, _S, _F),
    "memory": (_R, _P),
    "limit": (_C, _R, _P, _S, _F),
    "modify": (_C, _R, _P, _S, _F),
    "dedupe": (_C, _R, _P, _S, _F),
    "network": (_C, _R, _P, _S, _F),
    "capture": (_R, _P),
    "migrate": (_R,),
    "commit": (_C, _R, _P, _S, _F),
}


def check(machine: str, state: State, verb: str) -> None:
    """Raise InvalidState unless `verb` is legal in `state`."""
    legal = LEGAL[verb]
    if state not in legal:
        raise InvalidState(machine, state.value, verb, [s.value for s in legal])
