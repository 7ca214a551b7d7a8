"""What vos.devices needs of the machine under it; vmm gives it (vmm/devices.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from trivisor.core.devices import Device


@dataclass(frozen=True)
class Held:
    """One device of a machine as it is written down."""

    device: Device
    plugged: bool
    """Whether the machine has it now; what is kept for the next start it has not."""
    owner: int | None = None
    """With a device made in Python: the process that answers for it."""


class DevicePort(Protocol):
    """The devices of one machine, whichever process asks."""

    @property
    def kinds(self) -> frozenset[str]:
        """What the wall can be given: of disk, block, char, random."""
        ...

    def running(self) -> bool:
        """Tell whether the machine runs, so that a device is plugged at once."""
        ...

    def attach(self, name: str, device: Device, fd: int | None) -> None:
        """Plug a device, or keep it for the next start; `fd`, of one that a process answers for, is the caller's to close.

        Raises AlreadyExists, InvalidSpec, InvalidState, Busy, NotFound, EngineError, StorageError, UnsupportedByWall.
        """
        ...

    def detach(self, name: str) -> None:
        """Pull it out and forget it. Raises NotFound, InvalidState, Busy, GuestError, EngineError."""
        ...

    def place(self, name: str) -> str:
        """Return the PCI address of the port that a device is plugged in below, "" if there is none."""
        ...

    def held(self) -> Mapping[str, Held]:
        """Return all devices by name, in the order in which they were attached."""
        ...
