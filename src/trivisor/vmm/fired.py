"""A watchdog that fired: QEMU says so on its second monitor, which the keeper reads into the log `events`.

As with kills for want of memory, no process of ours waits for it: whoever asks for the machine, for events, or finds it ended reads that
log. An event bears the time that QEMU gave, by which it is written down once. QEMU may be in a guest's hands: what it says is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from math import isfinite

from trivisor.core.errors import TrivisorError
from trivisor.core.paths import MachineDir
from trivisor.core.state import State
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row

_TAIL = 64 << 10
_MOST = 16
"""Of the last ones so many are looked at."""
_ACTION = re.compile(r"[a-z-]{1,16}")


def note(context: Context, row: Row) -> Row:
    """Write down each time that the machine's watchdog fired, and that it paused the machine; return the record as it is now."""
    if row.spec.wall != "vm" or not (found := list(_fired(context.folder(row)))[-_MOST:]):
        return row
    new = context.records.note_once("watchdog", row.id, row.name, [(at, f"its watchdog fired: {action}") for at, action in found])
    if any(action == "pause" for at, action in found if at in new) and row.state is State.RUNNING:
        with suppress(TrivisorError):  # it is ending
            if context.engine(row.spec.wall, row.name).paused(context.box(row)):
                return context.records.update(row.id, event=("paused", "its watchdog fired"), state=State.PAUSED) or row
    return row


def killed(folder: MachineDir, started: float | None) -> str:
    """Return in words that the watchdog ended a life, "" if it did not."""
    last = [action for at, action in _fired(folder) if at >= (started or 0.0)][-1:]
    return f"its watchdog fired: {last[0]}" if last and last[0] in ("reset", "poweroff") else ""


def _fired(folder: MachineDir) -> Iterator[tuple[float, str]]:
    """Yield when the watchdog fired, in seconds since the epoch, and what QEMU did then."""
    try:
        with folder.log("events").open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _TAIL))
            lines = log.read(_TAIL).split(b"\n")
    except OSError:
        return
    for line in lines:
        if b'"WATCHDOG"' not in line:
            continue
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            said = json.loads(line)
            at = said["timestamp"]["seconds"] + said["timestamp"]["microseconds"] / 1e6
            if said["event"] == "WATCHDOG" and isfinite(at) and _ACTION.fullmatch(said["data"]["action"]):
                yield float(at), said["data"]["action"]
