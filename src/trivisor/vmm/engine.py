"""What the manager needs of an engine: the whole interface between the life of machines and a wall.

An engine is told about a machine by a Box. It never reads records, and it never stops a machine: the
keeper does that for every wall (launch/keeper.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import Spec, Wall
from trivisor.core.undo import Undo
from trivisor.vos.ports import MemoryPort, SyscallPort

Progress = Callable[[str], None]
"""Told, in a few words, what takes time now."""


@dataclass(frozen=True)
class Box:
    """One machine as an engine sees it."""

    id: str
    spec: Spec
    home: Home
    dir: MachineDir
    rootfs: Path
    """squashfs of the image's root (vm wall); there when `start` is called."""
    rootfs_digest: str
    """What names the root: the same for images of the same layers."""
    slot: int
    """Small number that no other machine of this home has: the source of its own host uid."""
    lowers: tuple[Path, ...]
    """The image's root unpacked (container, gvisor): folders to lay over one another, the uppermost first; there when `start` is called.
    Read-only, shared by all machines of the image."""
    host_folders: tuple[Path, ...] = ()
    """With image "host": the host's folders that lie in the root at the same place, each under a writable layer of its own."""
    owner: int | None = None
    """With lifetime="process": the pid that the keeper watches. It need not be the process that starts."""

    @property
    def host_root(self) -> bool:
        """Whether its root is the host's own (images/host.py)."""
        return bool(self.host_folders)


@dataclass(frozen=True)
class WallReport:
    """What one wall offers on this host. `why` and `remedy` are empty where it is available."""

    wall: Wall
    available: bool
    why: str = ""
    remedy: str = ""
    features: dict[str, bool] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    """In words: versions, accelerator and why, jail and what it lacks."""


@dataclass(frozen=True)
class Usage:
    """What a machine takes on the host. Bytes and seconds."""

    private: int
    shared: int
    cpu_seconds: float


class Engine(Protocol):
    """Drives one wall."""

    wall: Wall

    def report(self) -> WallReport:
        """Probe the host, quickly; dear verdicts are cached."""
        ...

    def check(self, spec: Spec) -> None:
        """Raise what `start` would raise for this spec on this host, before anything is made."""
        ...

    def create(self, box: Box, undo: Undo) -> None:
        """Make what a machine keeps while it is stopped (its disk)."""
        ...

    def start(self, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
        """Run keeper and engine until the guest is configured and answers. Return facts for info()."""
        ...

    def pause(self, box: Box) -> None:
        """Freeze: when this returns no guest instruction runs."""
        ...

    def resume(self, box: Box) -> None: ...

    def paused(self, box: Box) -> bool:
        """Ask the engine itself, whatever the record says."""
        ...

    def usage(self, box: Box) -> Usage: ...

    def syscalls(self, box: Box | None = None) -> SyscallPort:
        """Say what the wall does for vos.syscalls; of a machine, or of all."""
        ...

    def memory(self, box: Box) -> MemoryPort:
        """Say what the wall does for vos.memory, of a machine that runs or is paused."""
        ...

    def sweep(self, home: Home, machines: set[str]) -> list[str]:
        """Remove what a crash left outside the folders of `machines` (half-made kits, ice); say what."""
        ...
