"""`vmm.disks`: disks from other hypervisors into the home and out again, for machines to have, and machines' own disks out."""

from __future__ import annotations

import builtins
import dataclasses
import os
from pathlib import Path

from trivisor.core.devices import disk_name
from trivisor.core.errors import CallerError, InvalidSpec, NotFound
from trivisor.core.units import GIB, parse_size
from trivisor.images.disks import catalog, formats, ovfwrite, package, qemuimg
from trivisor.images.disks.catalog import StoredDisk
from trivisor.images.disks.formats import Format
from trivisor.images.disks.headers import Header
from trivisor.images.disks.qemuimg import DEFAULT, Bounds, Progress
from trivisor.vmm import diskout, packages
from trivisor.vmm.context import Context, pin_owner
from trivisor.vmm.packages import Appliance

AnyPath = str | os.PathLike[str]


def _silent(_: str) -> None:
    pass


class Disks:
    """The disks of one home. Machines have them as Disk("disk:NAME") (core/devices.py)."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def import_(
        self,
        path: AnyPath,
        name: str = "",
        format: Format | None = None,  # noqa: A002 - what it is
        *,
        bounds: Bounds = DEFAULT,
        progress: Progress = _silent,
    ) -> StoredDisk:
        """Bring in the disk image at `path` (qcow2, raw, VMDK, VHDX, VHD, VDI), called `name` or as its file is, as a qcow2 of the home.

        `format` is found out by its first bytes unless given; "raw" takes any file as it lies. The disk must stand for itself: one with a
        backing file, a parent or data in other files is refused. Raises InvalidSpec, NotFound, AlreadyExists, ImageError, StorageError,
        EngineError, HostLacks.
        """
        file = Path(path)
        if format is None and package.is_package(file):
            raise InvalidSpec(
                f"{file.name} is a package, not a disk", hint="import_package() takes its disks, and says what its machine has"
            )
        chosen = disk_name(name) if name else named(file)
        kind = formats.checked(format) if format is not None else None
        found = self._context.disks.import_(file, chosen, kind, str(file.absolute()), bounds, progress)
        self._context.records.note("disk-imported", f"{found.name} from {found.source}")
        return found

    def import_package(self, path: AnyPath, name: str = "", *, bounds: Bounds = DEFAULT, progress: Progress = _silent) -> Appliance:
        """Bring in the package of another hypervisor at `path`, an .ova, or an .ovf with its files beside it, and say what its machine has.

        Its disk becomes the disk `name` of the home (as the file is called), several NAME-1, NAME-2 and so on; all of them or none. Its
        manifest is checked; what its envelope requires and is not known is refused. Raises what `import_` raises.
        """
        file = Path(path)
        found = packages.bring(self._context, file, disk_name(name) if name else named(file), bounds, progress)
        self._context.records.note("disk-imported", f"{', '.join(disk.name for disk in found.disks) or 'no disks'} from {file.absolute()}")
        return found

    def list(self) -> builtins.list[StoredDisk]:
        """Return every disk, by name, with the machines that have it."""
        names = {pin_owner(row.id): row.name for row in self._context.records.rows()}
        owners = self._context.disks.owners()
        return [
            dataclasses.replace(disk, machines=tuple(names[owner] for owner in owners.get(disk.digest, ()) if owner in names))
            for disk in self._context.disks.list()
        ]

    def get(self, name: str) -> StoredDisk:
        """Return the disk with that name. Raises NotFound, StorageError if its file is gone."""
        self._context.disks.get(name)
        return next(disk for disk in self.list() if disk.name == name)

    def export(
        self,
        name: str,
        path: AnyPath,
        format: Format | None = None,  # noqa: A002 - what it is
        *,
        cpus: int = 1,
        memory: int | str = GIB,
        bounds: Bounds = DEFAULT,
        progress: Progress = _silent,
    ) -> Header:
        """Write the disk to the file `path`, which is replaced once all is written. `format`: what the file's name says, unless given.

        An .ova or .ovf is a package: of a machine with that disk, `cpus` processors and so much `memory`.

        Raises NotFound, InvalidSpec, StorageError, EngineError, HostLacks.
        """
        with self._context.disks.workspace() as work:
            self._context.disks.pin(self._context.disks.get_ref(name), work.owner)
            source = qemuimg.open_source(self.get(name).path, "qcow2", bounds)
            if format is None and package.is_package(Path(path)):
                machine = ovfwrite.Machine(name, cpus, parse_size(memory, "memory"))
                return packages.write(machine, source, Path(path), work.path, bounds, progress)
            to = formats.checked(format) if format is not None else None
            return catalog.write(source, Path(path), to, progress, bounds=bounds)

    def export_machine(
        self,
        machine: str,
        path: AnyPath,
        format: Format | None = None,  # noqa: A002 - what it is
        *,
        device: str = "",
        size: int | str | None = None,
        bounds: Bounds = DEFAULT,
        progress: Progress = _silent,
    ) -> Header:
        """Write the root of the machine with that name or id, image and all that it wrote, to the file `path`: a disk that an ext4 fills.

        There is no partition table and nothing to boot from in it. It is `size` large ("10G"), by default as the machine's own disk, or
        larger if need be. An .ova or .ovf is a package of the machine, with its processors, memory and network. With `device` it is
        instead what a disk that it was given under that name holds now, in a plain image. The machine stands still
        while its own part is read. Raises what Machine.commit raises, InvalidSpec, StorageError, EngineError, HostLacks.
        """
        context, to = self._context, formats.checked(format) if format is not None else None
        found = context.records.find(machine)
        if len(found) != 1:
            raise NotFound(f"there is no machine {machine!r}", machine=machine, hint="`trivisor ps -a` lists those there are")
        if device:
            if size is not None:
                raise InvalidSpec("a disk that a machine was given has a size of its own", hint="leave out the size")
            return diskout.device(context, found[0].id, device, Path(path), to, bounds, progress)
        wanted = parse_size(size, "size") if size is not None else None
        return diskout.root(context, found[0].id, Path(path), to, wanted, bounds, progress)

    def remove(self, name: str) -> None:
        """Remove the disk. Raises NotFound, CallerError if a machine has it."""
        for disk in self.list():
            if disk.name == name and disk.machines:
                raise CallerError(f"disk {name} is used by {', '.join(disk.machines)}", hint="detach it there first")
        self._context.disks.remove(name)


def named(file: Path) -> str:
    """Return what a disk is called after its file. Raises InvalidSpec if that can be no name."""
    stem = file.name.split(".")[0].lower()
    try:
        return disk_name(stem)
    except InvalidSpec:
        raise InvalidSpec(f"a disk cannot be called {stem!r}, as its file is", hint="give a name") from None
