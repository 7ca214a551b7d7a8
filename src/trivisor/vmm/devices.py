"""A machine's devices, across its lives: what is plugged now, and what is kept for each start.

They are written down in the machine's folder, aside and renamed, by whoever holds the machine's lock. A disk is the machine's until
it is detached, so a start plugs it again; a device that a process answers for goes with that process, or with the machine's life.
Which of those written down are there now, the engine is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from trivisor.core.devices import Device, Disk, Served, kind_of
from trivisor.core.errors import AlreadyExists, InvalidSpec, InvalidState, NotFound, TrivisorError, UnsupportedByWall
from trivisor.core.state import State, check
from trivisor.vmm import locks, means, reconcile, stored
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box
from trivisor.vmm.means import Given
from trivisor.vmm.plugged import Entry, entry, read, write
from trivisor.vmm.records import Row
from trivisor.vos.devices import diskfile
from trivisor.vos.devices.port import Held

_WAIT = 15.0
"""Seconds to wait for another attach or detach to end: they take a second at most, unless a guest holds on to a device."""
MOST = 64


class Hotplug(Protocol):
    """The devices of one running machine, as its engine has them."""

    @property
    def kinds(self) -> frozenset[str]: ...

    def plugged(self) -> set[str]: ...

    def modules(self, device: Device) -> tuple[str, ...]: ...

    def plug(self, name: str, device: Device, fd: int | None) -> None: ...

    def unplug(self, name: str) -> None: ...

    def place(self, name: str) -> str: ...


@runtime_checkable
class Hotpluggable(Protocol):
    """An engine whose machines can be given devices."""

    def hotplug(self, box: Box) -> Hotplug: ...


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
                raise UnsupportedByWall(f"attach a device of kind {kind_of(device)}", row.spec.wall, ["vm"], machine=row.name)
            live = row.state is State.RUNNING
            known = {key: found for key, found in read(self._folder(row)).items() if found.kept or live}
            if isinstance(device, Served) and not live:
                refused = InvalidState(row.name, row.state.value, "attach", [State.RUNNING.value])
                refused.hint = "start it first: a device that a process answers for is not kept for the next start"
                raise refused
            plug.modules(device)
            self._check_new(row, known, name)
            others = [found.device for found in known.values()]
            with stored.opened(self._context, row, name, device, others) as (opened, file):
                self._check_alone(row, known, opened, file)
                self._attach(row, plug, known, name, opened, fd if file is None else file, live=live)

    def _attach(self, row: Row, plug: Hotplug, known: dict[str, Entry], name: str, device: Device, fd: int | None, *, live: bool) -> None:
        device = means.check(self._context, row, known, device)
        if not live:
            write(self._folder(row), {**known, name: entry(device)})
            return
        with means.prepare(self._context, row, name, device, fd) as given:
            write(self._folder(row), {**known, name: entry(device, given.link)})
            try:
                _plug(self._context, row, plug, name, device, given)
            except BaseException as error:
                try:
                    means.forget(self._context, row, known)
                    write(self._folder(row), known)
                except TrivisorError as failure:
                    error.add_note(f"and it could not be crossed out: {failure}")
                raise

    def detach(self, name: str) -> None:
        with self._hold("detach") as row:
            known = read(self._folder(row))
            if name not in known:
                raise NotFound(f"there is no device {name}", machine=row.name, hint=_names(known))
            left = {key: value for key, value in known.items() if key != name}
            if row.state is State.RUNNING:
                plug = engine(self._context, row).hotplug(self._context.box(row))
                if name in plug.plugged():
                    means.release(self._context, row, known[name].device)
                plug.unplug(name)
                means.forget(self._context, row, left)
            means.gone(known[name].device)
            write(self._folder(row), left)
            stored.release(self._context, row, known[name].device, [found.device for found in left.values()])

    def place(self, name: str) -> str:
        row = self._context.row(self._machine)
        return engine(self._context, row).hotplug(self._context.box(row)).place(name)

    def held(self) -> dict[str, Held]:
        row = self._context.row(self._machine)
        known = read(self._folder(row))
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

    def _check_new(self, row: Row, known: dict[str, Entry], name: str) -> None:
        if name in known:
            raise AlreadyExists(f"there is a device {name}", machine=row.name, hint="give another name, or detach it")
        if len(known) >= MOST:
            raise InvalidSpec(f"a machine may have {MOST} devices", machine=row.name, hint="detach one first")

    def _check_alone(self, row: Row, known: dict[str, Entry], device: Device, fd: int | None) -> None:
        """Refuse a disk that the machine has already, by whatever name."""
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

    def _folder(self, row: Row) -> Path:
        return self._context.folder(row).root


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
    for name, found in list(kept.items()):
        fd = None
        try:
            device = found.device
            fd = diskfile.open_disk(device) if isinstance(device, Disk) else None
            means.check(context, row, {key: value for key, value in kept.items() if key != name}, device)
            with means.prepare(context, row, name, device, fd) as given:
                kept[name] = entry(device, given.link)
                if kept[name] != found:
                    write(folder, kept)
                _plug(context, row, plug, name, device, given)
        except TrivisorError as error:
            error.hint = f"{error.hint + '; ' if error.hint else ''}or detach {name}: the machine starts without it then"
            raise
        finally:
            if fd is not None:
                os.close(fd)


def _plug(context: Context, row: Row, plug: Hotplug, name: str, device: Device, given: Given) -> None:
    """Have the guest load the drivers of what comes, give it that, and have it configured."""
    if modules := plug.modules(device):
        means.configure(context, row, [("module", *modules)])
    plug.plug(name, device, given.fd)
    try:
        means.finish(context, row, name, device, given, plug.place)
    except BaseException as error:
        try:
            plug.unplug(name)
        except TrivisorError as failure:
            error.add_note(f"and it could not be taken away again: {failure}")
        raise


def engine(context: Context, row: Row) -> Hotpluggable:
    """Return the engine of a machine whose wall can be given devices. Raises UnsupportedByWall."""
    found = context.engine(row.spec.wall, row.name)
    if not isinstance(found, Hotpluggable):
        raise UnsupportedByWall("be given devices", row.spec.wall, ["vm", "container"], machine=row.name)
    return found


def _names(known: dict[str, Entry]) -> str:
    return f"there are {', '.join(known)}" if known else "it has none"
