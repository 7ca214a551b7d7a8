"""What is written down of a machine's devices, in its folder: devices.json."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.devices import KINDS, Device, Served, check_name, kind_of, path_of
from trivisor.core.errors import InvalidSpec, StorageError
from trivisor.core.process import Who


class Link(msgspec.Struct, frozen=True):
    """The host's end of a network card that is plugged."""

    interface: str
    address: str
    """The guest's."""
    network: str


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device: just one of `served` and the kinds of core.devices.KINDS is there, with the fields of its value."""

    disk: dict[str, Any] | None = None
    random: dict[str, Any] | None = None
    serial: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    folder: dict[str, Any] | None = None
    watchdog: dict[str, Any] | None = None
    hostusb: dict[str, Any] | None = None
    hostpci: dict[str, Any] | None = None
    served: Served | None = None
    owner: Who | None = None
    link: Link | None = None

    @property
    def device(self) -> Device:
        if self.served is not None:
            return self.served
        for kind, known in KINDS.items():
            if (value := getattr(self, kind)) is not None:
                return known(**value)
        raise InvalidSpec("a device without a kind")

    @property
    def kept(self) -> bool:
        """Whether the next start plugs it again."""
        return self.served is None


def entry(device: Device, link: Link | None = None) -> Entry:
    """Return what is written down of a device that this process attaches."""
    if isinstance(device, Served):
        return Entry(served=device, owner=Who.me())
    value: dict[str, Any] = {kind_of(device): dataclasses.asdict(device)}
    return Entry(link=link, **value)


def read(folder: Path) -> dict[str, Entry]:
    """Return what is written down in a machine's folder. Raises StorageError for a damaged file."""
    path = folder / "devices.json"
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Entry])
        for name, found in known.items():
            check_name(name)
            found.device  # noqa: B018 - raises for what is none
        return known
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, InvalidSpec, TypeError) as error:
        raise StorageError(f"{path} cannot be read: {error}", hint="remove it: the machine has no other devices then") from error


def write(folder: Path, entries: dict[str, Entry]) -> None:
    """Write them down. Raises StorageError."""
    path, aside = folder / "devices.json", folder / ".devices.json"
    try:
        with aside.open("wb") as stream:
            stream.write(msgspec.json.encode(entries))
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def cards(folder: Path) -> list[Entry]:
    """Return the network cards that a machine is given, now or at its next start."""
    with suppress(StorageError):
        return [found for found in read(folder).values() if found.network is not None]
    return []


def sockets(folder: Path) -> list[str]:
    """Return where a machine's serial ports are met on the host."""
    with suppress(StorageError):
        return [path_of(found.device) for found in read(folder).values() if found.serial is not None]
    return []


def links(folder: Path) -> list[Link]:
    """Return the links of those that were plugged when it was written down."""
    return [found.link for found in cards(folder) if found.link is not None]
