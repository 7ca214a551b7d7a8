"""An image's layers, and what a machine wrote over them, as one ext4 file system that fills a disk.

The layers are laid over one another in memory (images/tree.py), so no name of an image meets the host; what comes of them is unpacked into
a folder of its own and written by `mke2fs -d`, which mounts nothing. Without root both are done by the root of a user namespace, where
the owners of files are what they were as far as the caller's subordinate ids reach.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import EngineError, ImageError, InvalidSpec, StorageError
from trivisor.core.process import find, run
from trivisor.core.units import MIB, format_size
from trivisor.images import older, squash
from trivisor.images.layer import apply
from trivisor.images.limits import DEFAULT
from trivisor.images.source import LayerSource, Source
from trivisor.images.stream import Hashed, Section, unpack
from trivisor.images.tree import Tree
from trivisor.launch import ids

Progress = Callable[[str], object]
_BLOCK = 4096
_INODE = 16384
"""Bytes of a disk to an inode, as mke2fs has it by default."""
_TIMEOUT = 3600.0
_ROOM = 1 << 20
LOST = "without root or subordinate ids: all files in the disk belong to root"


@dataclass(frozen=True)
class Layer:
    """One layer in a file, as it is stored; `diff_id` is the digest of its tar."""

    path: Path
    diff_id: str


def make(layers: Sequence[Layer], target: Path, work: Path, size: int | None, least: int, progress: Progress) -> None:
    """Write the layers, the lowest first, to the new file `target`: an ext4 of `size` bytes, or for None of `least` or what it takes.

    `work` is a folder for what is made on the way. Raises InvalidSpec if they do not fit, ImageError, EngineError, StorageError, HostLacks.
    """
    squashfs, tree = work / "whole.squashfs", work / "tree"
    with ExitStack() as stack:
        whole, sources = _read(layers, stack, progress)
        taken, entries = _weight(whole)
        # Tables of inodes and of blocks, and the journal, come on top.
        room = taken + taken // 8 + entries * 512 + 64 * MIB
        if size is not None and size < room:
            raise InvalidSpec(f"a disk of {format_size(size)} is too small", hint=f"it takes {format_size(room)}")
        chosen = -(-(size or max(least, room)) // _BLOCK) * _BLOCK
        progress("writing what is in the layers")
        squash.make(whole, sources, squashfs)
    try:
        progress("unpacking it")
        _unpack(squashfs, tree, progress)
        squashfs.unlink()
        progress("making the file system")
        with target.open("xb") as file:
            file.truncate(chosen)
        _as_root([find("mke2fs", "e2fsprogs"), *_options(chosen, entries), "-d", str(tree), str(target)], target)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        squashfs.unlink(missing_ok=True)
        if tree.exists():
            ids.remove_tree(tree)


def _read(layers: Sequence[Layer], stack: ExitStack, progress: Progress) -> tuple[Tree, list[Source]]:
    tree = Tree(DEFAULT, "the disk")
    sources: list[Source] = []
    for number, layer in enumerate(layers):
        progress(f"reading layer {number + 1} of {len(layers)}")
        file = stack.enter_context(layer.path.open("rb"))
        length = os.fstat(file.fileno()).st_size
        plain = Hashed(unpack(Section(file.fileno(), 0, length, layer.diff_id), DEFAULT), DEFAULT)
        tree.layer = number
        apply(tree, plain, number, DEFAULT, layered=True)
        if plain.digest() != layer.diff_id:
            raise ImageError(f"{layer.diff_id}: the layer is not what the image's config says", hint="get the image again")
        sources.append(LayerSource(Section(file.fileno(), 0, length, layer.diff_id), DEFAULT))
    tree.need()
    return tree, sources


def _weight(tree: Tree) -> tuple[int, int]:
    """Return the bytes of all files, in blocks and without their holes, and how many entries there are."""
    seen: set[int] = set()
    taken = entries = 0
    for _, node in tree.walk():
        entries += 1
        if node.kind == "d":
            taken += _BLOCK
        elif node.content is not None and id(node) not in seen:
            seen.add(id(node))
            pieces = node.content.sparse
            taken += sum(-(-size // _BLOCK) * _BLOCK + _BLOCK for _, size in pieces) if pieces else -(-node.content.size // _BLOCK) * _BLOCK
    return taken, entries


def _unpack(squashfs: Path, tree: Path, progress: Progress) -> None:
    if os.geteuid() == 0:
        older.unsquash(squashfs, tree)
        return
    try:
        ids.run_as_root([find("unsquashfs", "squashfs-tools"), "-no-progress", "-quiet", "-dest", str(tree), str(squashfs)], _TIMEOUT)
    except EngineError:
        # Its owners cannot be given here; the caller's own id is root's in the file system.
        if tree.exists():
            ids.remove_tree(tree)
        older.unsquash(squashfs, tree)
        progress(LOST)


def _as_root(argv: Sequence[str], target: Path) -> None:
    try:
        if os.geteuid() == 0:
            run(argv, timeout=_TIMEOUT)
        else:
            ids.run_as_root(argv, _TIMEOUT)
    except EngineError as error:
        facts = os.statvfs(target.parent)
        if facts.f_bavail * facts.f_frsize < _ROOM:
            raise StorageError(f"{target.parent}: the disk is full", hint="free space, or set TRIVISOR_HOME to a larger disk") from error
        raise


def _options(size: int, entries: int) -> list[str]:
    options = ["-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-m", "0", "-L", "root", "-N", str(max(size // _INODE, entries * 5 // 4 + 64))]
    # A fresh file is zeros: nothing is left to initialise in the background.
    return [*options, "-E", "nodiscard,assume_storage_prezeroed=1,lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0"]
