"""From what a person has (a folder, an archive) to an OCI image's blobs in the store.

A folder becomes one layer, written anew; a plain tar becomes one as it is, its own bytes packed. What `docker save` and OCI layouts
hold keeps its layers, its config and its digests. All is read through a Tree before it is let in: what would not be safe to unpack
is refused here, with the member's name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from trivisor.core.errors import ImageError
from trivisor.images import model
from trivisor.images.archive import Archive, Packed
from trivisor.images.folder import read_folder
from trivisor.images.layer import apply
from trivisor.images.limits import Limits
from trivisor.images.model import Descriptor, History, ImageConfig, Manifest, Platform, RootFs, RunConfig
from trivisor.images.pack import LayerWriter, PackedLayer
from trivisor.images.source import FolderSource
from trivisor.images.stream import CHUNK, Hashed, Section, Stream, packing, unpack
from trivisor.images.tarwrite import emit
from trivisor.images.tree import Content, Tree
from trivisor.store.faults import translated
from trivisor.store.store import Store
from trivisor.store.workspace import Workspace

Progress = Callable[[str], None]
_TYPES = {"": model.OCI_LAYER, "gzip": model.OCI_LAYER_GZIP, "zstd": model.OCI_LAYER_ZSTD}


class Intake:
    """One import. `take` puts the blobs of one image into the store, held by the workspace, and returns its manifest."""

    def __init__(self, store: Store, work: Workspace, limits: Limits, progress: Progress) -> None:
        self._store = store
        self._work = work
        self._limits = limits
        self._progress = progress
        self._stack = ExitStack()

    def __enter__(self) -> Intake:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, source: Path, reference: str, platform: Platform, by: str = "import") -> tuple[bytes, str]:
        """Return the manifest and its media type. `reference` chooses among several images of one archive, `platform` among those of
        one image; `by` is how its history says it came about. Raises ImageError, StorageError.
        """
        found = self._look(source)
        if isinstance(found, Archive):
            return self._archive(found, found.image(reference, platform))
        return self._single(found(), by, platform)

    def every(self, source: Path, platform: Platform) -> list[tuple[list[str], bytes, str]]:
        """Return names as the archive has them, manifest and media type of each image in it for `platform`.

        Raises ImageError, also for what is no archive of images; StorageError.
        """
        found = self._look(source)
        if not isinstance(found, Archive):
            raise ImageError(f"{source}: it is no archive of images", hint="`trivisor import` makes an image of a tar or a folder of files")
        return [(names, *self._archive(found, packed)) for names, packed in found.every(platform)]

    def _look(self, source: Path) -> Archive | Callable[[], tuple[Descriptor, str]]:
        """Return the archive of images that `source` is, or what makes a layer of it."""
        tree = Tree(self._limits, source.name or str(source))
        self._progress(f"reading {source}")
        if source.is_dir():
            files = read_folder(tree, source, self._limits)
            if Archive.holds(tree):
                return Archive(tree, self._folder_opener(files), self._limits)
            _usable(tree, source)
            return partial(self._packed, tree, files)
        section = self._open(source)
        self._read(tree, section)
        if Archive.holds(tree):
            if packing(section.part(0, section.end, section.name).read(6)):
                section = self._spool(section)
                tree = Tree(self._limits, tree.origin)
                self._read(tree, section)
            return Archive(tree, _archive_opener(section), self._limits)
        _usable(tree, source)
        return partial(self._as_it_is, section)

    def folder(self, source: Path, platform: Platform, by: str, run: RunConfig) -> tuple[bytes, str]:
        """Return the manifest of an image of one layer: what is in `source`, even if that looks like an archive."""
        tree = Tree(self._limits, source.name)
        return self._single(self._packed(tree, read_folder(tree, source, self._limits)), by, platform, run)

    # One layer

    def _packed(self, tree: Tree, files: FolderSource) -> tuple[Descriptor, str]:
        self._progress("packing the layer")
        with LayerWriter(self._work.path / "layer") as layer:
            emit(tree, [files], layer.write, root=True)
            return self._adopt(layer.close())

    def _as_it_is(self, section: Section) -> tuple[Descriptor, str]:
        """Take the tar itself for the layer: packed if it is not, or in a way that layers are not."""
        self._progress("packing the layer")
        kind = packing(section.part(0, section.end, section.name).read(6))
        stream = unpack(section.part(0, section.end, section.name), self._limits)
        if kind in ("gzip", "zstd"):
            return self._kept(section, kind)
        with LayerWriter(self._work.path / "layer") as layer:
            while data := stream.read(CHUNK):
                layer.write(data)
            return self._adopt(layer.close())

    def _kept(self, section: Section, kind: str) -> tuple[Descriptor, str]:
        """Store a layer as it came, and return what it is as a plain tar too."""
        size = section.end - section.start
        digest = self._store.add(section.part(0, size, section.name), self._work.owner)
        plain = Hashed(unpack(section.part(0, size, section.name), self._limits), self._limits).digest() if kind else digest
        return Descriptor(_TYPES[kind], digest, size), plain

    def _adopt(self, layer: PackedLayer) -> tuple[Descriptor, str]:
        self._store.adopt(layer.path, self._work.owner, known=layer.digest)
        return layer.descriptor, layer.diff_id

    def _single(self, layer: tuple[Descriptor, str], by: str, platform: Platform, run: RunConfig | None = None) -> tuple[bytes, str]:
        descriptor, diff = layer
        config = ImageConfig(platform.architecture, platform.os, RootFs("layers", [diff]), run, [History(created_by=by)])
        return self._manifest(model.encode(config), [descriptor])

    # Several

    def _archive(self, archive: Archive, packed: Packed) -> tuple[bytes, str]:
        diffs = self._checked(packed, archive.origin)
        config = model.decode(packed.config, ImageConfig, archive.origin, self._limits)
        if config.rootfs.diff_ids != diffs:
            raise ImageError(f"{archive.origin}: a layer is damaged: it is not what the image's config says", hint="fetch it again")
        if packed.manifest:
            for section in packed.layers:
                self._store.add(section.part(0, section.end - section.start, section.name), self._work.owner)
            self._store.add(Bytes(packed.config), self._work.owner)
            return packed.manifest, packed.media_type
        layers: list[Descriptor] = []
        for section in packed.layers:
            kind = packing(section.part(0, section.end - section.start, section.name).read(6))
            layers.append(self._kept(section, kind)[0] if kind in _TYPES else self._repacked(section, len(layers)))
        return self._manifest(packed.config, layers)

    def _checked(self, packed: Packed, origin: str) -> list[str]:
        """Put the layers over one another in memory, and return their digests as plain tars."""
        tree = Tree(self._limits, origin)
        diffs = []
        for number, section in enumerate(packed.layers):
            self._progress(f"reading layer {number + 1} of {len(packed.layers)}")
            tree.layer = number
            plain = Hashed(unpack(section.part(0, section.end - section.start, section.name), self._limits), self._limits)
            apply(tree, plain, number, self._limits, layered=True)
            diffs.append(plain.digest())
        _usable(tree, origin)
        return diffs

    def _repacked(self, section: Section, number: int) -> Descriptor:
        stream = unpack(section.part(0, section.end - section.start, section.name), self._limits)
        with LayerWriter(self._work.path / f"layer-{number}") as layer:
            while data := stream.read(CHUNK):
                layer.write(data)
            return self._adopt(layer.close())[0]

    def _manifest(self, config: bytes, layers: list[Descriptor]) -> tuple[bytes, str]:
        digest = self._store.add(Bytes(config), self._work.owner)
        described = Descriptor(model.OCI_CONFIG, digest, len(config))
        return model.encode(Manifest(described, layers, 2, model.OCI_MANIFEST)), model.OCI_MANIFEST

    # Reading

    def _open(self, source: Path) -> Section:
        try:
            # Non-blocking: a FIFO would wait for its writer.
            fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            hint = "give a folder, a tar archive, or what `docker save` wrote"
            raise ImageError(f"{source}: {error.strerror}", hint=hint) from error
        self._stack.callback(os.close, fd)
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise ImageError(f"{source}: neither a folder nor a file", hint="save it to a file first")
        return Section(fd, 0, facts.st_size, source.name)

    def _read(self, tree: Tree, section: Section) -> None:
        stream: Stream = unpack(section.part(0, section.end, section.name), self._limits)
        apply(tree, stream, 0, self._limits, layered=False)

    def _spool(self, section: Section) -> Section:
        """Unpack a packed archive of layers to a file: layers are read in an order of their own."""
        stream = unpack(section.part(0, section.end, section.name), self._limits)
        folder = self._work.path
        with translated(folder):
            file = self._stack.enter_context((folder / "archive").open("w+b"))
        size = 0
        while data := stream.read(CHUNK):
            size += len(data)
            if size > self._limits.total:
                raise ImageError(f"{section.name}: larger than the limit of {self._limits.total} bytes unpacked")
            with translated(folder):
                file.write(data)
        with translated(folder):
            file.flush()
        return Section(file.fileno(), 0, size, section.name)

    def _folder_opener(self, files: FolderSource) -> Callable[[Content, str], Section]:
        def open_(content: Content, name: str) -> Section:
            path = files.paths[content.position]
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise ImageError(f"{path}: {error.strerror}") from error
            self._stack.callback(os.close, fd)
            return Section(fd, 0, content.size, name)

        return open_


class Bytes:
    """A document, as the store reads it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int, /) -> bytes:
        data, self._data = self._data[:size], self._data[size:]
        return data


def _archive_opener(section: Section) -> Callable[[Content, str], Section]:
    return lambda content, name: section.part(content.position, content.size, name)


def _usable(tree: Tree, source: Path | str) -> None:
    if not tree.root.children:
        raise ImageError(f"{source}: there is nothing in it")
    tree.need()
