"""What the host asks of the guest itself: set-up, figures, power-off, a sign of life."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from trivisor.core.errors import GuestError, GuestProtocolError
from trivisor.vos import wire
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes
from trivisor.vos.wire import Type

_STATS_MAX = 64 * 1024


def configure(line: Line, steps: Sequence[Sequence[str]], timeout: float = 60.0) -> None:
    """Carry out `steps` (PROTOCOL.md, "Steps") in order. Raises GuestError with the number and words of one that fails."""
    line.request(Type.STEPS, wire.steps(steps), timeout)


def shutdown(line: Line, *, reboot: bool = False) -> None:
    """Ask the guest to end its programs, sync, unmount and power off. Does not wait: `line.wait_closed(timeout)` does."""
    line.post(wire.frame(Type.SHUTDOWN, 0, bytes([reboot])))


def ping(line: Line, timeout: float = 5.0) -> float:
    """Return the seconds that a message takes there and back. Raises GuestError if none comes back in time."""
    token = os.urandom(8)
    began = time.monotonic()
    if line.request(Type.PING, token, timeout) != token:
        raise GuestProtocolError("the guest answers a PING with something else", machine=line.machine)
    return time.monotonic() - began


def stats(processes: Processes, timeout: float = 10.0) -> dict[str, float]:
    """Return the machine's own figures by name, in bytes, seconds and counts.

    memory_*, swap_*, disk_*, network_*: bytes; cpu_user, cpu_system, cpu_idle, uptime: seconds; cpus, processes,
    load1, load5, load15: as they are. A machine may lie about itself; what it takes on the host, the host knows.
    """
    result = processes.run_builtin(["stats"], timeout=timeout, limit=_STATS_MAX)
    if result.exit_code:
        raise GuestError(f"stats failed: {result.error_text.strip()[:200]}", machine=processes.machine)
    figures: dict[str, float] = {}
    for row in result.stdout.decode("ascii", "replace").splitlines():
        key, _, value = row.partition(" ")
        try:
            figures[key] = float(value) if "." in value else int(value)
        except ValueError:
            raise GuestProtocolError(f"stats holds the line {row[:80]!r}", machine=processes.machine) from None
    return {key: value / 1e6 if key in ("cpu_user", "cpu_system", "cpu_idle", "uptime") else value for key, value in figures.items()}
