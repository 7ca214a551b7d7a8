"""From what a person has (a folder, an archive) to a squashfs and a config, with nothing left behind."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trivisor.core.errors import ImageError
from trivisor.images import squash
from trivisor.images.archive import Archive
from trivisor.images.folder import read_folder
from trivisor.images.layer import apply
from trivisor.images.limits import Limits
from trivisor.images.source import FolderSource, LayerSource, Source
from trivisor.images.stream import CHUNK, Section, packing, unpack
from trivisor.images.tree import Content, Tree
from trivisor.store.faults import translated

Progress = Callable[[str], None]


def build(source: Path, reference: str, folder: Path, limits: Limits, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Make a squashfs of `source` in `folder` and return it with the image's config.

    `reference` chooses among several images of one archive. Raises ImageError for what is not safe or not
    an image, StorageError, HostLacks.
    """
    with ExitStack() as stack:
        tree = Tree(limits, source.name or str(source))
        progress(f"reading {source}")
        sources: list[Source]
        if source.is_dir():
            files = read_folder(tree, source, limits)
            sources = [files]
            opener = _folder_opener(files, stack)
        else:
            section = _open(source, stack)
            if Archive.holds(_read(tree, section, limits)) and packing(section.part(0, section.end, section.name).read(6)):
                section = _spool(section, folder / "archive", limits, stack)
                tree = Tree(limits, tree.origin)
                _read(tree, section, limits)
            sources = [LayerSource(section, limits)]
            opener = _archive_opener(section)
        config: dict[str, Any] = {}
        if Archive.holds(tree):
            packed = Archive(tree, opener, limits).image(reference)
            tree = Tree(limits, tree.origin)
            sources = []
            for number, layer in enumerate(packed.layers):
                progress(f"reading layer {number + 1} of {len(packed.layers)}")
                tree.layer = number
                apply(tree, unpack(layer, limits), number, limits, layered=True)
                sources.append(LayerSource(layer.part(0, layer.end - layer.start, layer.name), limits))
            config = packed.config
        if not tree.root.children:
            raise ImageError(f"{source}: there is nothing in it")
        tree.need()
        target = folder / "root.squashfs"
        progress("writing the root file system")
        squash.make(tree, sources, target)
        return target, config


def _open(source: Path, stack: ExitStack) -> Section:
    try:
        # Non-blocking: a FIFO would wait for its writer.
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{source}: {error.strerror}", hint="give a folder, a tar archive, or what `docker save` wrote") from error
    stack.callback(os.close, fd)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise ImageError(f"{source}: neither a folder nor a file", hint="save it to a file first")
    return Section(fd, 0, facts.st_size, source.name)


def _read(tree: Tree, section: Section, limits: Limits) -> Tree:
    apply(tree, unpack(section.part(0, section.end, section.name), limits), 0, limits, layered=False)
    return tree


def _spool(section: Section, target: Path, limits: Limits, stack: ExitStack) -> Section:
    """Unpack a packed archive of layers to a file: layers are read in an order of their own."""
    stream = unpack(section.part(0, section.end, section.name), limits)
    with translated(target.parent):
        file = stack.enter_context(target.open("w+b"))
    size = 0
    while data := stream.read(CHUNK):
        size += len(data)
        if size > limits.total:
            raise ImageError(f"{section.name}: larger than the limit of {limits.total} bytes unpacked")
        with translated(target.parent):
            file.write(data)
    with translated(target.parent):
        file.flush()
    return Section(file.fileno(), 0, size, section.name)


def _archive_opener(section: Section) -> Callable[[Content, str], Section]:
    return lambda content, name: section.part(content.position, content.size, name)


def _folder_opener(files: FolderSource, stack: ExitStack) -> Callable[[Content, str], Section]:
    def open_(content: Content, name: str) -> Section:
        path = files.paths[content.position]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error
        stack.callback(os.close, fd)
        return Section(fd, 0, content.size, name)

    return open_
