"""What a migration needs of an engine, and an engine of a migration."""

from __future__ import annotations

import socket
from typing import Protocol, runtime_checkable

from trivisor.core.undo import Undo
from trivisor.vmm.engine import Box, Progress
from trivisor.vmm.migration.messages import Hardware


class Precopy(Protocol):
    """How far memory is. Bytes, bytes a second, seconds."""

    @property
    def status(self) -> str: ...

    @property
    def sent(self) -> int: ...

    @property
    def remaining(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def dirty(self) -> float: ...

    @property
    def expected(self) -> float: ...

    @property
    def rounds(self) -> int: ...

    @property
    def why(self) -> str: ...

    @property
    def ready(self) -> bool:
        """The guest stands still, and waits for its disk."""
        ...


class Departure(Protocol):
    """A running machine on its way out (engines/vm/streams.py)."""

    def live(self) -> bool:
        """Whether it may run while its memory is sent."""
        ...

    def halt(self) -> None:
        """Have it stand still."""
        ...

    def mirror(self, nbd: int) -> None: ...

    def mirrored(self) -> tuple[int, int, bool]: ...

    def send(self, memory: int, *, downtime: float, rate: int | None, throttle: bool) -> None: ...

    def sending(self) -> Precopy: ...

    def looked(self) -> Precopy: ...

    def part(self, *, mirrored: bool) -> None: ...

    def finish(self, timeout: float) -> None: ...

    def abandon(self) -> None:
        """Have it run on as if nothing had been."""
        ...


class Arrival(Protocol):
    """What brings a machine."""

    def disk(self, sock: socket.socket) -> None:
        """Take the socket by which the empty disk is written."""
        ...

    def memory(self, sock: socket.socket) -> None:
        """Take the socket into which memory goes."""
        ...

    def ready(self) -> None: ...

    def look(self) -> None:
        """Raise if nothing more will come."""
        ...

    def over(self) -> bool:
        """Whether the last of memory came."""
        ...

    def loaded(self) -> None:
        """Return when the machine may run, which is written down then. Raises if it may not."""
        ...

    def gone_on(self) -> None:
        """It runs."""
        ...


@runtime_checkable
class Mover(Protocol):
    """An engine whose machines move while they run."""

    def leaving(self, box: Box) -> Hardware:
        """Return what the machine needs of a target. Raises UnsupportedByWall, with the reason, for one that must stay."""
        ...

    def departure(self, box: Box) -> Departure: ...

    def suits(self, box: Box, hardware: Hardware) -> None:
        """Raise HostLacks, StorageError or MigrationError if this host cannot be the target; touches nothing."""
        ...

    def arrive(self, box: Box, hardware: Hardware, arrival: Arrival, undo: Undo, progress: Progress) -> dict[str, str]:
        """Run the machine that `arrival` brings until its guest answers; return facts as `Engine.start` does."""
        ...
