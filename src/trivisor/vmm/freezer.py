"""Freeze and clone: what snapshots, restore, fork, suspend and pools ask of a wall.

A frozen machine is a folder of plain files that the engine wrote and that it alone understands; who keeps it (vmm/snapshots) lists,
verifies, packs and moves those files as bytes. With memory it holds the whole machine at one instant: RAM, devices and writable layer;
without, the writable layer alone. Once frozen nothing in it is ever written again: any number of machines may run from it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from trivisor.core.undo import Undo
from trivisor.vmm.engine import Box, Progress


@dataclass(frozen=True)
class Frozen:
    """What an engine says of what it froze."""

    needs: Mapping[str, str]
    """What a host must have to run it on: words and their values (program, version, processor, kit), compared by `Freezer.fits`."""
    paused: float
    """Seconds for which no guest instruction ran."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """In words, for who looks at it."""


@runtime_checkable
class Freezer(Protocol):
    """An engine that freezes machines: `isinstance(engine, Freezer)`."""

    def freeze(
        self, box: Box, into: Path, *, memory: bool, ends: bool = False, lasting: bool = True, quiesce: bool = False, progress: Progress
    ) -> Frozen:
        """Freeze a machine into the empty folder `into`, on the home's file system, durably unless `lasting` is false (a fork's, which
        nobody needs after a crash of the host: no fsync). With `quiesce` its file systems are at rest at that instant.

        With `memory` it runs or is paused, and afterwards does again what it did; with `ends` it does not go on: its engine and its
        keeper have ended. Without, it may also stand still. Crash-consistent: the disk is that of the same instant. If it fails, or
        the caller dies, the machine goes on as before. Raises UnsupportedByWall, EngineError, StorageError, GuestError.
        """
        ...

    def fits(self, box: Box, needs: Mapping[str, str]) -> None:
        """Raise HostLacks, with what differs, if this host cannot run on what was frozen with these needs. Touches nothing."""
        ...

    def thaw(self, box: Box, frozen: Path, *, other: bool, undo: Undo, progress: Progress) -> dict[str, str]:
        """Start `box` from what was frozen with memory, until its guest answers; return facts as `Engine.start` does.

        Entropy and clock are always set anew. With `other` it is another machine than the frozen one: hostname, machine id, MAC, address
        and hooks as well. Replaces whatever writable layer the box has. Raises EngineError, HostLacks, StorageError, GuestError.
        """
        ...

    def refill(self, box: Box, frozen: Path, undo: Undo) -> None:
        """Give `box`, which does not run, the frozen writable layer in place of its own: all of it or what was there."""
        ...
