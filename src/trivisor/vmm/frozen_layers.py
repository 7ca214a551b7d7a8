"""The writable layer of a machine of container or gVisor as a file, and back: what freezing and thawing it share.

A tar, whose ids are those inside the machine, or the ext4 of a disk of its own size. It is written and read by tar(1) as root of a user
namespace with the machine's ids: whiteouts and overlayfs's marks go with it, and the file knows nothing of the ids outside. A tmpfs
(disk="ram") lies nowhere that the host sees.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from trivisor.core import process
from trivisor.core.errors import EngineError, StorageError, UnsupportedByWall
from trivisor.core.undo import Undo
from trivisor.launch import ids, once
from trivisor.launch.ids import Shape
from trivisor.launch.plan import Op
from trivisor.vmm import layers
from trivisor.vmm.engine import Box

TAR = "layer.tar"
DISK = "layer.ext4"
_TIMEOUT = 600.0
_WORK = "./*/work/*"
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
    if layers.sized(box.spec):
        _copy(layers.disk_file(box), into / DISK, box.spec.name, lasting=lasting)
        return
    words = ["--create", "--sparse", "--exclude", _WORK, *_MARKS, "."]
    with _opened(into / TAR, os.O_WRONLY | os.O_CREAT | os.O_EXCL, box.spec.name) as archive:
        _tar(box, shape, box.dir.root / "layers", words, archive.fileno(), 1)
        if lasting:
            os.fsync(archive.fileno())


def give(box: Box, shape: Shape, frozen: Path, undo: Undo) -> None:
    """Have a machine that does not run have the layer in `frozen` in place of its own: all of it or what was there.

    Raises EngineError, StorageError.
    """
    if layers.sized(box.spec):
        aside = layers.disk_file(box).with_suffix(".new")
        undo.add("layer", lambda: aside.unlink(missing_ok=True))
        aside.unlink(missing_ok=True)
        _copy(frozen / DISK, aside, box.spec.name, lasting=True)
        aside.rename(layers.disk_file(box))
        return
    place = box.dir.root / "layers"
    aside = place.with_name("layers.new")
    undo.add("layer", lambda: ids.remove_tree(aside))
    ids.remove_tree(aside)
    try:
        aside.mkdir(mode=0o755)
        owner = shape.ids(box.slot).owner
        if owner != (os.geteuid(), os.getegid()):
            os.chown(aside, *owner)
    except OSError as error:
        raise StorageError(f"{aside} cannot be made: {error.strerror}", machine=box.spec.name, hint="free space under the home") from error
    words = ["--extract", "--preserve-permissions", "--same-owner", "--delay-directory-restore", *_MARKS]
    with _opened(frozen / TAR, os.O_RDONLY, box.spec.name) as archive:
        _tar(box, shape, aside, words, archive.fileno(), 0)
    if os.geteuid() == 0:
        os.chown(aside, 0, 0)
    exchange(aside, place)
    ids.remove_tree(aside)


def _tar(box: Box, shape: Shape, tree: Path, words: Sequence[str], archive: int, stream: int) -> None:
    """Run tar in `tree`, as the machine's root, with the archive as its standard input (0) or output (1)."""
    plan: list[Op] = [("namespaces", "user"), *shape.ids(box.slot).plan()]
    folder = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        plan += [("env", "PATH=/usr/bin:/bin"), ("fd", str(folder), str(_TREE)), ("fd", str(archive), str(stream))]
        # Nobody but the home's user may walk to the folder: it is entered by its descriptor.
        command = [process.find("tar", "tar"), "--directory", f"/proc/self/fd/{_TREE}", "--file", "-", *words]
        done = once.run((*plan, ("exec", *command)), _TIMEOUT, [folder, archive])
    finally:
        os.close(folder)
    if done.status:
        what = "kept" if stream else "laid back"
        raise EngineError(f"its writable layer cannot be {what}", command=command, output=done.said, machine=box.spec.name)


def _opened(path: Path, flags: int, machine: str) -> BinaryIO:
    try:
        return open(os.open(path, flags | os.O_CLOEXEC, 0o600), "rb" if flags == os.O_RDONLY else "wb")
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}", machine=machine) from error


def _copy(source: Path, target: Path, machine: str, *, lasting: bool) -> None:
    """Copy a sparse file: by reference where the file system can."""
    try:
        process.run([process.find("cp", "coreutils"), "--sparse=always", "--reflink=auto", source, target], timeout=_TIMEOUT)
        if lasting:
            with target.open("rb") as copy:
                os.fsync(copy.fileno())
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}", machine=machine) from error


def exchange(one: Path, other: Path) -> None:
    """Have two files swap names at once (renameat2(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) < 0:
        hint = "the home's file system must exchange names"
        raise StorageError(f"{other} cannot be replaced: {os.strerror(ctypes.get_errno())}", hint=hint)
