"""Ending a build early: what its steps run in is taken away from under them.

A step waits for its machine in a thread of its own, which nobody can interrupt; but the machine can be deleted by anybody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

from trivisor.core.errors import TrivisorError

if TYPE_CHECKING:
    from trivisor.vmm.machine import Machine


class Halted(Exception):
    """The build has ended meanwhile, for another reason."""


class Halt:
    """What all steps of one build have in common: whether they are to go on."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._machines: set[Machine] = set()
        self._called = False

    def check(self) -> None:
        """Raise Halted if the build has ended."""
        if self._called:
            raise Halted

    @contextlib.contextmanager
    def watching(self, machine: Machine) -> Iterator[None]:
        """Delete the machine when the build ends early. Raises Halted, in place of what the body raises of that."""
        with self._lock:
            self.check()
            self._machines.add(machine)
        try:
            yield
        except TrivisorError:
            self.check()
            raise
        finally:
            with self._lock:
                self._machines.discard(machine)

    def call(self) -> None:
        """End what runs, and let nothing begin."""
        with self._lock:
            self._called = True
            machines = [*self._machines]
        for machine in machines:
            with contextlib.suppress(TrivisorError):
                machine.delete(force=True)
