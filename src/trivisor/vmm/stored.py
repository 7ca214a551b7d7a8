"""What a machine has of a disk of the home: the disk itself, if it is only read, else a part of its own that lies over it.

That part is a qcow2 in the machine's folder without a backing file in its header: which disk it lies over is written down with the
device, and named to the engine. It is made with the device and goes with it, or with the machine; the disk below is pinned as long.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from trivisor.core.devices import Device, Disk
from trivisor.core.errors import StorageError
from trivisor.images.disks import qemuimg
from trivisor.vmm.context import Context, pin_owner
from trivisor.vmm.records import Row
from trivisor.vos.devices import diskfile


@contextmanager
def opened(context: Context, row: Row, name: str, device: Device, others: Iterable[Device]) -> Iterator[tuple[Device, int | None]]:
    """Give a device as it is attached, and a disk's file, closed at the end. What was made for it is taken back if the body fails.

    Raises NotFound, InvalidSpec, StorageError, EngineError, HostLacks.
    """
    if not isinstance(device, Disk):
        yield device, None
        return
    with ExitStack() as taken:
        if device.stored:
            found = context.disks.get(device.stored)
            context.disks.pin(found.digest, pin_owner(row.id))
            device = replace(device, path=found.path, format="qcow2", below="")
            taken.callback(release, context, row, device, others)
            if not device.readonly:
                device = _own(context, row, name, device, found.size)
                taken.callback(release, context, row, device, others)
        fd = diskfile.open_disk(device)
        try:
            yield device, fd
        finally:
            os.close(fd)
        taken.pop_all()


def release(context: Context, row: Row, device: Device, others: Iterable[Device]) -> None:
    """Take away what a machine had of a disk of the home; `others` are the devices that it keeps."""
    if not isinstance(device, Disk):
        return
    if device.below and device.file.parent == _folder(context, row):
        try:
            device.file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{device.path} cannot be removed: {error.strerror}", machine=row.name) from error
    digest = _digest(context, device)
    if digest is not None and digest not in {_digest(context, other) for other in others if isinstance(other, Disk)}:
        context.disks.unpin(pin_owner(row.id), digest)


def _own(context: Context, row: Row, name: str, disk: Disk, size: int) -> Disk:
    """Make a machine's own part over a disk of the home, and return it."""
    path = _folder(context, row) / f"{name}.qcow2"
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        aside.unlink(missing_ok=True)
        qemuimg.create(aside, size)
        aside.rename(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}", machine=row.name) from error
    finally:
        aside.unlink(missing_ok=True)
    return replace(disk, path=path, format="qcow2", below=str(disk.path))


def _folder(context: Context, row: Row) -> Path:
    return context.folder(row).root / "disks"


def _digest(context: Context, disk: Disk) -> str | None:
    return context.disks.digest_of(disk.below or str(disk.path))
