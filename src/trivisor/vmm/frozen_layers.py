"""The writable layer of a machine of container or gVisor as a file, and back: what freezing and thawing it share.

A tar, whose ids are those inside the machine. It is written and read by tar(1) as root of a user namespace with the machine's ids:
whiteouts and overlayfs's marks go with it, and the file knows nothing of the ids outside, nor of the size of a disk. A tmpfs
(disk="ram") lies nowhere that the host sees.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trivisor.core import process
from trivisor.core.errors import EngineError, StorageError, UnsupportedByWall
from trivisor.core.undo import Undo
from trivisor.launch import detached, loop, once
from trivisor.launch.ids import Shape
from trivisor.launch.plan import Op
from trivisor.vmm import layers, removal
from trivisor.vmm.engine import Box

TAR = "layer.tar"
_TIMEOUT = 600.0
_SPARE = "work"
_WORK = f"./*/{_SPARE}/*"
"""What overlayfs keeps for itself, and makes anew."""
_EXCHANGE = 2
_MARKS = ("--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*")
_TREE = 3
"""The descriptor of the folder in tar."""


def possible(box: Box) -> None:
    """Raise UnsupportedByWall for a machine whose layer is not on a disk of the host."""
    if box.spec.disk == "ram":
        raise UnsupportedByWall('be frozen with disk="ram"', box.spec.wall, ("vm",), machine=box.spec.name)


def keep(box: Box, shape: Shape, into: Path, *, lasting: bool = True) -> None:
    """Write the layer of a machine that stands still into the folder `into`. Raises EngineError, StorageError."""
    words = ["--create", "--sparse", "--exclude", _WORK, "--exclude", "./lost+found", *_MARKS, "."]
    aside = into / f"{TAR}.part"
    with _opened(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, box.spec.name) as archive, _tree(box) as tree:
        _tar(box, shape, tree, words, archive.fileno(), 1)
        if lasting:
            os.fsync(archive.fileno())
    aside.rename(into / TAR)  # what has this name is whole


def give(box: Box, shape: Shape, frozen: Path, undo: Undo) -> None:
    """Have a machine that does not run have the layer in `frozen` in place of its own: all of it or what was there.

    Raises EngineError, StorageError.
    """
    place = box.dir.root / "layers"
    aside = place.with_name("layers.new")
    disk = layers.disk_file(box).with_suffix(".ext4.new")
    undo.add("layer", lambda: _clear(aside, disk))
    _clear(aside, disk)
    try:
        aside.mkdir(mode=0o755)
        owner = shape.ids(box.slot).owner
        if owner != (os.geteuid(), os.getegid()):
            os.chown(aside, *owner)
    except OSError as error:
        raise StorageError(f"{aside} cannot be made: {error.strerror}", machine=box.spec.name, hint="free space under the home") from error
    words = ["--extract", "--preserve-permissions", "--same-owner", "--delay-directory-restore", *_MARKS]
    with _opened(frozen / TAR, os.O_RDONLY, box.spec.name) as archive, _entered(aside) as tree:
        _tar(box, shape, tree, words, archive.fileno(), 0)
    if os.geteuid() == 0:
        os.chown(aside, 0, 0)
    if layers.sized(box.spec):
        layers.make_disk(box, disk, aside)
        disk.rename(layers.disk_file(box))
    else:
        exchange(aside, place)
    removal.remove_tree(aside)


def _clear(folder: Path, disk: Path) -> None:
    removal.remove_tree(folder)
    disk.unlink(missing_ok=True)


@contextmanager
def _tree(box: Box) -> Iterator[int]:
    """Give a descriptor of the folder that the machine's layers lie in."""
    if not layers.sized(box.spec):
        with _entered(box.dir.root / "layers") as folder:
            yield folder
        return
    with loop.attached(layers.disk_file(box)) as device, detached.mounted(device) as root:
        yield root


@contextmanager
def _entered(path: Path) -> Iterator[int]:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


def _tar(box: Box, shape: Shape, tree: int, words: Sequence[str], archive: int, stream: int) -> None:
    """Run tar in `tree`, as the machine's root, with the archive as its standard input (0) or output (1)."""
    # Nobody but the home's user may walk to the folder: it is entered by its descriptor.
    command = [process.find("tar", "tar"), "--directory", f"/proc/self/fd/{_TREE}", "--file", "-", *words]
    plan: list[Op] = [("namespaces", "user"), *shape.ids(box.slot).plan(), ("env", "PATH=/usr/bin:/bin")]
    plan += [("fd", str(tree), str(_TREE)), ("fd", str(archive), str(stream)), ("exec", *command)]
    done = once.run(tuple(plan), _TIMEOUT, [tree, archive])
    if done.status:
        what = "kept" if stream else "laid back"
        raise EngineError(f"its writable layer cannot be {what}", command=command, output=done.said, machine=box.spec.name)


def _opened(path: Path, flags: int, machine: str) -> BinaryIO:
    try:
        return open(os.open(path, flags | os.O_CLOEXEC, 0o600), "rb" if flags == os.O_RDONLY else "wb")
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}", machine=machine) from error


def exchange(one: Path, other: Path) -> None:
    """Have two files swap names at once (renameat2(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) < 0:
        hint = "the home's file system must exchange names"
        raise StorageError(f"{other} cannot be replaced: {os.strerror(ctypes.get_errno())}", hint=hint)
