"""The writable layer: a thin qcow2 that holds an empty ext4.

It is made once per size, without root and without mounting anything: mkfs on a sparse file, which it leaves
almost empty, then qemu-img. A machine's disk is a copy of that template, some one or two megabytes. The inode tables and the journal
are zeros of a fresh file already, so the guest has nothing left to initialise in the background.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.files import sync
from trivisor.core.paths import Home
from trivisor.core.process import find, run
from trivisor.core.units import MIB
from trivisor.vmm.engines.vm import files

_FORMAT = 2
_BLOCK = 4096
_MAGIC = b"QFI\xfb"
_DATA_ELSEWHERE = 1 << 2
"""Of a qcow2's features: its data are in another file."""


def check() -> None:
    """Raise HostLacks if a tool is missing."""
    find("mkfs.ext4", "e2fsprogs")
    find("qemu-img", "qemu-utils")


def template(home: Home, size: int) -> Path:
    """Return the template of `size` bytes, made at the first call. Raises HostLacks, EngineError, StorageError."""
    size = rounded(size)
    path = home.cache / f"disk-{size}-{_FORMAT}.qcow2"
    if path.exists():
        return path
    with files.workspace(home, "disk") as work:
        raw, made = work / "raw", work / "qcow2"
        with raw.open("wb") as stream:
            stream.truncate(size)
        run([find("mkfs.ext4", "e2fsprogs"), *_options(size), raw], timeout=120)
        run([find("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", raw, made], timeout=120)
        sync(made)
        # Whoever else made it made the same.
        made.rename(path)
    return path


def rounded(size: int) -> int:
    """Return the size of the disk that is made for a wish of `size` bytes."""
    return size // _BLOCK * _BLOCK


def size(disk: Path) -> int:
    """Return the bytes that the guest sees of a disk (docs/interop/qcow2.txt). Raises StorageError."""
    try:
        with disk.open("rb") as stream:
            head = stream.read(32)
    except OSError as error:
        raise files.storage(error, "reading the machine's disk") from error
    if len(head) < 32 or head[:4] != _MAGIC:
        raise StorageError(f"{disk} is not a disk of a machine", hint="delete the machine")
    return int(struct.unpack_from(">Q", head, 24)[0])


def alone(disk: Path) -> bool:
    """Whether a disk is a qcow2 that is all in its own file: it names none to read from behind it, and none that its data are in."""
    try:
        with disk.open("rb") as stream:
            head = stream.read(80)
    except OSError as error:
        raise files.storage(error, "reading the machine's disk") from error
    if len(head) < 80 or head[:4] != _MAGIC:
        return False
    version, behind = struct.unpack_from(">IQ", head, 4)
    features = struct.unpack_from(">Q", head, 72)[0]
    return bool(version == 3 and behind == 0 and not features & _DATA_ELSEWHERE)


def create(home: Home, size: int, target: Path) -> None:
    """Make a machine's disk at `target`."""
    copy(template(home, size), target)


def copy(source: Path, target: Path) -> None:
    """Put a copy of the disk `source` at `target`, aside first, so that `target` is whole whatever happens."""
    aside = target.with_name(f".{target.name}-{os.urandom(4).hex()}")
    try:
        files.copy_file(source, aside)
        aside.rename(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise files.storage(error, "writing the machine's disk") from error


def _options(size: int) -> list[str]:
    options = ["-q", "-F", "-b", str(_BLOCK), "-m", "0", "-L", "trivisor"]
    # What mkfs writes lies together, so that the copy that each machine gets is small; growing does without resize_inode (meta_bg).
    options += ["-G", "64", "-O", "^resize_inode"]
    options += ["-E", "nodiscard,assume_storage_prezeroed=1,lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0"]
    if size >= 1024 * MIB:
        options += ["-J", "size=32"]
    return options
