"""One process's lines to its machines: each opened when first needed, opened again when it closed.

All Machines of one VMM that mean the same machine share a line, so that getting one a thousand times opens one
socket and one thread. A line belongs to the process that opened it (vos/line.py): a forked child opens its own.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from trivisor.vos.line import Line


class GuestLine:
    """Holds at most one Line. Thread-safe, and usable on both sides of a fork."""

    def __init__(self, path: Path, machine: str) -> None:
        self._path = path
        self._machine = machine
        self._line: Line | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def get(self) -> Line:
        """Return an open line. Raises GuestGone if no keeper answers."""
        self._after_fork()
        with self._lock:
            if self._line is None or self._line.closed:
                self._line = Line.connect(self._path, self._machine)
            return self._line

    def close(self) -> None:
        self._after_fork()
        with self._lock:
            line, self._line = self._line, None
        if line is not None:
            line.close()

    def _after_fork(self) -> None:
        # The parent's lock may have been held by a thread that the child does not have.
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._line = None
            self._pid = os.getpid()


class Lines:
    """The lines of one VMM, by machine. No lock of its own: a forked child could find it held."""

    def __init__(self) -> None:
        self._lines: dict[str, GuestLine] = {}

    def of(self, machine: str, path: Path, name: str) -> GuestLine:
        return self._lines.setdefault(machine, GuestLine(path, name))

    def drop(self, machine: str) -> None:
        """Close the line to a machine that stopped or is gone. What is under way on it ends with GuestGone."""
        line = self._lines.pop(machine, None)
        if line is not None:
            line.close()

    def close(self) -> None:
        for machine in list(self._lines):
            self.drop(machine)
