"""A machine's disk made larger: what of it cannot be, what is to be known before, and the doing.

Only that: the file system lies on all of a disk, and a smaller one would have to be moved together first. Disks are sparse files, so none
of the host's space is taken before something is written; that there is less of it than may be written is said, and is no error.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from trivisor.core.errors import InvalidSpec, UnsupportedByWall
from trivisor.core.units import format_size
from trivisor.launch import ext4
from trivisor.vmm import layers
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Box
from trivisor.vmm.records import Row


@runtime_checkable
class Stretchable(Protocol):
    """An engine whose guests take part in it."""

    def grow_disk(self, box: Box, size: int, timeout: float) -> None: ...


def check(row: Row, size: int) -> None:
    """Raise InvalidSpec, with the reason, if the disk cannot become `size` bytes."""
    has = row.spec.disk
    if has == "ram":
        hint = "its size goes with the memory" if row.spec.wall == "vm" else "half its memory, as it was when the machine was started"
        raise InvalidSpec("its writable layer is kept in memory and is no disk", machine=row.name, hint=hint)
    if row.spec.wall != "vm" and not layers.sized(row.spec):
        hint = "the file system of the home is its bound; a machine made with disk= has a disk of that size"
        raise InvalidSpec("it has no disk of its own: its writable layer is a folder", machine=row.name, hint=hint)
    if size < has:
        hint = "make another machine with a smaller one, and copy what is needed"
        raise InvalidSpec(f"a disk does not shrink: its file system lies on all of its {format_size(has)}", machine=row.name, hint=hint)


def not_now(row: Row) -> str:
    """Return why a machine that runs cannot have a larger disk without a restart, "" if it can."""
    return "" if row.spec.wall == "vm" or ext4.able() else "a file system in use is made larger with CAP_SYS_RESOURCE alone"


def note(context: Context, row: Row, size: int) -> str:
    """Return in words that the host has less space than a disk of `size` bytes may come to take, "" if it has."""
    free = shutil.disk_usage(context.home.root).free
    more = size - _taken(context, row)
    return f"the host has {format_size(free)} free, and it may come to take {format_size(more)} more" if more > free else ""


def carry_out(context: Context, row: Row, size: int, timeout: float) -> None:
    """Make the disk of a machine that is alive `size` bytes. Raises StorageError, EngineError, GuestError."""
    box = context.box(row)
    engine = context.engine(row.spec.wall, row.name)
    if isinstance(engine, Stretchable):
        engine.grow_disk(box, size, timeout)
    elif row.spec.wall == "vm":
        raise UnsupportedByWall("have its disk made larger", row.spec.wall, ["vm", "gvisor", "container"], machine=row.name)
    else:
        layers.grow(box, size, live=True)


def _taken(context: Context, row: Row) -> int:
    """Return the bytes that the disk takes of the host already."""
    box = context.box(row)
    file: Path = box.dir.disk if row.spec.wall == "vm" else layers.disk_file(box)
    with suppress(OSError):
        return file.stat().st_blocks * 512
    return 0
