"""What a machine has on its disks, as disk images: its root with all that it wrote, or a disk that it was given.

The machine stands still while what it wrote is read (commit.py); the rest is done beside it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from trivisor.core.devices import Disk
from trivisor.core.errors import InvalidSpec, NotFound
from trivisor.core.units import MIB
from trivisor.images import host
from trivisor.images.disks import catalog, formats, package, qemuimg, rootdisk
from trivisor.images.disks.formats import Format
from trivisor.images.disks.headers import Header, read
from trivisor.images.disks.qemuimg import Bounds, Progress, Source
from trivisor.images.disks.rootdisk import Layer
from trivisor.store import workspace
from trivisor.vmm import commit, packages, plugged
from trivisor.vmm.context import Context

LEAST = 64 * MIB


def root(context: Context, machine: str, target: Path, to: Format | None, size: int | None, bounds: Bounds, progress: Progress) -> Header:
    """Write the machine's root, an ext4 that fills the disk, to the file `target`. Raises what Machine.export_disk raises."""
    packed = to is None and package.is_package(target)
    kind = to or ("vmdk" if packed else formats.of_name(target))
    row = context.row(machine)
    # What is unpacked lies in the home's own folder for half-made things: its sweep removes files of any owner.
    with context.images.workspace() as lease, workspace.workspace(context.home.tmp) as work:
        # Its layers stay until this is done, whatever becomes of the machine meanwhile.
        context.images.store.hold(row.digest, lease.owner)
        source = make_root(context, machine, work.path, size, progress)
        if packed:
            return packages.write(packages.machine_of(row.spec), source, target, work.path, bounds, progress)
        return catalog.write(source, target, kind, progress, bounds=bounds)


def make_root(context: Context, machine: str, work: Path, size: int | None, progress: Progress) -> Source:
    """Make the machine's root as a disk in the folder `work`."""
    row = context.row(machine)
    if row.digest.startswith(host.PREFIX):
        raise InvalidSpec("a machine on the host's own root has no disk of its own", machine=row.name)
    documents = context.images.documents(row.digest)
    progress("reading what the machine wrote")
    packed = commit.layer(context, machine, work / "layer", without=(), latest=None)
    found = zip(documents.manifest.layers, documents.config.rootfs.diff_ids, strict=True)
    layers = [Layer(context.images.store.path(layer.digest), diff_id) for layer, diff_id in found]
    least = LEAST if row.spec.disk == "ram" else row.spec.disk
    rootdisk.make([*layers, Layer(packed.path, packed.diff_id)], work / "root.raw", work, size, least, progress)
    return qemuimg.open_source(work / "root.raw", "raw")


def device(context: Context, machine: str, name: str, target: Path, to: Format | None, bounds: Bounds, progress: Progress) -> Header:
    """Write what a disk that the machine was given holds now to the file `target`; the machine stands still meanwhile."""
    kind = to or formats.of_name(target)
    with ExitStack() as stack:
        row = stack.enter_context(commit.still(context, machine))
        entries = plugged.read(context.folder(row).root)
        disk = entries[name].device if name in entries else None
        if not isinstance(disk, Disk):
            hint = f"it has {', '.join(name for name, entry in entries.items() if entry.disk) or 'none'}"
            raise NotFound(f"there is no disk {name}", machine=row.name, hint=hint)
        below = Path(disk.below) if disk.below else None
        own = disk.file.resolve()
        return catalog.write(Source(own, read(own, disk.format), below, shared=True), target, kind, progress, bounds=bounds)
