"""A machine's devices, across its lives: what is plugged now, and what is kept for each start.

They are written down in the machine's folder, aside and renamed, by whoever holds the machine's lock. A disk is the machine's until
it is detached, so a start plugs it again; a device that a process answers for goes with that process, or with the machine's life.
Which of those written down are there now, the engine is asked.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from trivisor.core.devices import Device, Disk, Random, Served, check_name, kind_of
from trivisor.core.errors import AlreadyExists, InvalidSpec, InvalidState, NotFound, StorageError, TrivisorError, UnsupportedByWall
from trivisor.core.paths import MachineDir
from trivisor.core.process import Who
from trivisor.core.state import State, check
from trivisor.vmm import locks, reconcile
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box
from trivisor.vmm.records import Row
from trivisor.vos import guest
from trivisor.vos.devices import diskfile
from trivisor.vos.devices.port import Held
from trivisor.vos.line import Line

_WAIT = 15.0
"""Seconds to wait for another attach or detach to end: they take a second at most, unless a guest holds on to a device."""
MOST = 64
_MODULES = 30.0


class Hotplug(Protocol):
    """The devices of one running machine, as its engine has them."""

    @property
    def kinds(self) -> frozenset[str]: ...

    def plugged(self) -> set[str]: ...

    def modules(self, device: Device) -> tuple[str, ...]: ...

    def plug(self, name: str, device: Device, fd: int | None) -> None: ...

    def unplug(self, name: str) -> None: ...


@runtime_checkable
class Hotpluggable(Protocol):
    """An engine whose machines can be given devices."""

    def hotplug(self, box: Box) -> Hotplug: ...


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device in the file: just one of disk, served and random is there."""

    disk: dict[str, Any] | None = None
    """The fields of a Disk."""
    served: Served | None = None
    random: Random | None = None
    owner: Who | None = None

    @property
    def device(self) -> Device:
        found = Disk(**self.disk) if self.disk else self.served or self.random
        if found is None:
            raise InvalidSpec("a device without a kind")
        return found

    @property
    def kept(self) -> bool:
        """Whether the next start plugs it again."""
        return self.served is None


def entry(device: Device) -> Entry:
    """Return what is written down of a device that this process attaches."""
    if isinstance(device, Disk):
        return Entry(disk=dataclasses.asdict(device))
    return Entry(served=device, owner=Who.me()) if isinstance(device, Served) else Entry(random=device)


class MachineDevices:
    """The DevicePort of one machine."""

    def __init__(self, context: Context, machine: str) -> None:
        self._context = context
        self._machine = machine

    @property
    def kinds(self) -> frozenset[str]:
        row = self._context.row(self._machine)
        return engine(self._context, row).hotplug(self._context.box(row)).kinds

    def running(self) -> bool:
        row = reconcile.settle(self._context, self._context.row(self._machine))
        return row is not None and row.state is State.RUNNING

    def attach(self, name: str, device: Device, fd: int | None) -> None:
        with self._hold("attach") as row:
            plug = engine(self._context, row).hotplug(self._context.box(row))
            if kind_of(device) not in plug.kinds:
                raise UnsupportedByWall(f"attach a device of kind {kind_of(device)}", row.spec.wall, machine=row.name)
            live = row.state is State.RUNNING
            known = {key: found for key, found in self._read(row).items() if found.kept or live}
            if isinstance(device, Served) and not live:
                raise InvalidState(row.name, row.state.value, "attach a device of this process to", [State.RUNNING.value])
            plug.modules(device)
            self._check_new(row, known, name, device, fd)
            self._write(row, {**known, name: entry(device)})
            if not live:
                return
            try:
                _load(self._context.folder(row), row, plug.modules(device))
                plug.plug(name, device, fd)
            except BaseException as error:
                try:
                    self._write(row, known)
                except TrivisorError as failure:
                    error.add_note(f"and it could not be crossed out: {failure}")
                raise

    def detach(self, name: str) -> None:
        with self._hold("detach") as row:
            known = self._read(row)
            if name not in known:
                raise NotFound(f"there is no device {name}", machine=row.name, hint=_names(known))
            if row.state is State.RUNNING:
                engine(self._context, row).hotplug(self._context.box(row)).unplug(name)
            self._write(row, {key: value for key, value in known.items() if key != name})

    def held(self) -> dict[str, Held]:
        row = self._context.row(self._machine)
        known = self._read(row)
        if not known:
            return {}
        settled = reconcile.settle(self._context, row)
        live = settled is not None and settled.state in reconcile.LIVE
        there = engine(self._context, row).hotplug(self._context.box(row)).plugged() if live else set()
        return {
            name: Held(found.device, name in there, found.owner.pid if found.owner else None)
            for name, found in known.items()
            if found.kept or name in there
        }

    @contextmanager
    def _hold(self, verb: str) -> Iterator[Row]:
        row = self._context.row(self._machine)
        with locks.hold(self._context.folder(row).lock, verb, row.name, wait=_WAIT):
            settled = reconcile.settle_held(self._context, self._machine)
            if settled is None:
                raise NotFound(f"machine {row.name} is gone", machine=row.name, hint="it was deleted meanwhile")
            check(settled.name, settled.state, verb)
            yield settled

    def _check_new(self, row: Row, known: dict[str, Entry], name: str, device: Device, fd: int | None) -> None:
        if name in known:
            raise AlreadyExists(f"there is a device {name}", machine=row.name, hint="give another name, or detach it")
        if len(known) >= MOST:
            raise InvalidSpec(f"a machine may have {MOST} devices", machine=row.name, hint="detach one first")
        if not isinstance(device, Disk) or fd is None:
            return
        ours = diskfile.identity(fd)
        for other, found in known.items():
            other_disk = found.device
            if not isinstance(other_disk, Disk):
                continue
            with suppress(OSError):
                seen = os.open(other_disk.file, os.O_PATH | os.O_CLOEXEC)
                try:
                    same = diskfile.identity(seen) == ours
                finally:
                    os.close(seen)
                if same:
                    raise InvalidSpec(f"{device.path} is attached as {other} already", machine=row.name, hint="a disk is attached once")

    def _read(self, row: Row) -> dict[str, Entry]:
        return read(self._context.folder(row).root)

    def _write(self, row: Row, entries: dict[str, Entry]) -> None:
        write(self._context.folder(row).root, entries)


def restore(context: Context, row: Row) -> None:
    """Plug what is kept into a machine that has just started, by whoever holds its lock; forget what went with the last life.

    Raises what an attach raises, naming the device.
    """
    folder = context.folder(row).root
    known = read(folder)
    if not known:
        return
    kept = {name: found for name, found in known.items() if found.kept}
    if kept != known:
        write(folder, kept)
    plug = engine(context, row).hotplug(context.box(row))
    for name, found in kept.items():
        fd = None
        try:
            device = found.device
            fd = diskfile.open_disk(device) if isinstance(device, Disk) else None
            _load(context.folder(row), row, plug.modules(device))
            plug.plug(name, device, fd)
        except TrivisorError as error:
            error.hint = f"{error.hint + '; ' if error.hint else ''}or detach {name}: the machine starts without it then"
            raise
        finally:
            if fd is not None:
                os.close(fd)


def _load(folder: MachineDir, row: Row, modules: tuple[str, ...]) -> None:
    """Have the guest load the drivers of what comes."""
    if not modules:
        return
    line = Line.connect(folder.line, row.name)
    try:
        guest.configure(line, [("module", *modules)], timeout=_MODULES)
    finally:
        line.close()


def engine(context: Context, row: Row) -> Hotpluggable:
    """Return the engine of a machine whose wall can be given devices. Raises UnsupportedByWall."""
    found = context.engine(row.spec.wall, row.name)
    if not isinstance(found, Hotpluggable):
        raise UnsupportedByWall("be given devices", row.spec.wall, ["vm", "container"], machine=row.name)
    return found


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


def _names(known: dict[str, Entry]) -> str:
    return f"there are {', '.join(known)}" if known else "it has none"
