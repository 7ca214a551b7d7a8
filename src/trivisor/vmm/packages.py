"""Packages of other hypervisors (OVF, OVA): their disks become disks of the home, and their hardware what a machine is asked to be."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from trivisor.core.devices import disk_name
from trivisor.core.errors import ImageError, TrivisorError
from trivisor.core.spec import Spec
from trivisor.images.disks import headers, ovfwrite, package, qemuimg
from trivisor.images.disks.catalog import StoredDisk
from trivisor.images.disks.headers import Header
from trivisor.images.disks.ovf import Card
from trivisor.images.disks.qemuimg import Bounds, Progress, Source
from trivisor.vmm.context import Context


@dataclass(frozen=True)
class Appliance:
    """A package that was brought in. Memory in bytes."""

    name: str
    cpus: int
    memory: int
    disks: tuple[StoredDisk, ...]
    """In the order in which its machine has them."""
    cards: tuple[Card, ...]
    system: str
    """Its operating system, in words."""
    left_out: tuple[str, ...]
    """Sections and devices that it may do without, and that were not taken."""

    @property
    def wishes(self) -> dict[str, Any]:
        """The keyword arguments of VMM.create for a machine of that size: cpus, memory, network."""
        return {"cpus": self.cpus, "memory": self.memory, "network": "nat" if self.cards else "none"}


def bring(context: Context, path: Path, name: str, bounds: Bounds, progress: Progress) -> Appliance:
    """Bring in the package at `path`: all of its disks, or none."""
    with ExitStack() as made, package.opened(path) as opened:
        system = opened.system
        single = len(system.disks) == 1
        names = [disk_name(name if single else f"{name}-{number}") for number in range(1, len(system.disks) + 1)]
        for one in names:
            context.disks.free(one)
        opened.verify({disk.file for disk in system.disks if disk.file is not None})
        disks = []
        for one, disk in zip(names, system.disks, strict=True):
            disks.append(_disk(context, opened, path, one, disk.file, disk.capacity, bounds, progress))
            made.callback(_undo, context, one)
        made.pop_all()
    return Appliance(system.name, system.cpus, system.memory, tuple(disks), system.cards, system.system, system.left_out)


def _disk(
    context: Context, opened: package.Package, path: Path, name: str, file: str | None, capacity: int, bounds: Bounds, progress: Progress
) -> StoredDisk:
    with context.disks.workspace() as work:
        source = f"{path.absolute()}: {file or 'an empty disk'}"
        if file is None:
            if not 0 < capacity <= bounds.virtual:
                raise ImageError(f"{path.name}: an empty disk of {capacity} bytes; the bound is {bounds.virtual}")
            empty = work.path / "empty"
            qemuimg.create(empty, capacity)
            return context.disks.import_(empty, name, "qcow2", source, bounds, progress)
        progress(f"reading {file}")
        copy = work.path / file
        opened.disk(file, copy, bounds.virtual)
        kind = headers.read(copy).format
        if kind == "raw":
            raise ImageError(f"{path.name}: {file} is a disk of no format that is known here", hint="have it exported with VMDK disks")
        return context.disks.import_(copy, name, kind, source, bounds, progress)


def _undo(context: Context, name: str) -> None:
    try:
        context.disks.remove(name)
    except TrivisorError as error:
        raise ImageError(f"disk {name} of a package that could not be brought in is left: {error}", hint="remove it") from error


def write(machine: ovfwrite.Machine, source: Source, target: Path, work: Path, bounds: Bounds, progress: Progress) -> Header:
    """Write the package `target` of a machine with the disk `source`; `work` is a folder for what is made on the way."""
    made = work / "disk.vmdk"
    header = qemuimg.convert(source, made, "vmdk", stream=True, bounds=bounds, progress=progress)
    progress("writing the package")
    ovfwrite.write(machine, [ovfwrite.Disk(made, header.size)], target)
    return header


def machine_of(spec: Spec) -> ovfwrite.Machine:
    """Return what a package says of a machine that was asked to be so."""
    cards = () if spec.network in ("none", "host") else (Card(spec.network),)
    return ovfwrite.Machine(spec.name, max(1, ceil(spec.cpus)), spec.memory, cards)
