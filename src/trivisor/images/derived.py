"""The roots of images: which there are of a digest, where they lie, and how they are made of its layers.

A root's name is that of the chain of its layers, so that images that differ in name and config alone share it. An image of a home
made before images were OCI images is its own squashfs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from trivisor.core.errors import ImageError, NotFound
from trivisor.core.paths import Home
from trivisor.images import host, older, rootless, squash, stacked
from trivisor.images.documents import Documents, Library
from trivisor.images.layer import apply
from trivisor.images.layers import ROOT, Unstackable, unpack_layers
from trivisor.images.limits import DEFAULT
from trivisor.images.model import Platform, digest_of
from trivisor.images.place import Owners
from trivisor.images.roots import Cache
from trivisor.images.source import LayerSource, Source
from trivisor.images.stream import Hashed, Section, unpack
from trivisor.images.tree import Tree
from trivisor.store.store import Store

Progress = Callable[[str], None]
LOST = "without root or subordinate ids: owners, setuid bits and file capabilities of the image are lost"
LOST_SOME = "without root: owners of the image that are beyond this user's subordinate ids are lost"
STEPS = "build:"
"""Begins the names of layers that steps of builds made (va/build/cache.py)."""
_SQUASHFS = "root.squashfs"
_LOST = "lost"
_STACKED = "stacked-"
"""Begins the name of a root for machines that are not kept (stacked.py)."""
_MERGED = "merged-"
"""Begins the name of all of an image in one folder, where layers cannot be stacked."""
_EMPTY = digest_of(b"")


class Derived:
    """The roots of one home's images."""

    def __init__(self, home: Home, store: Store, library: Library) -> None:
        self._store = store
        self._library = library
        self._places: dict[str, tuple[Path, tuple[Path, ...]]] = {}
        self._trees = Cache(home.cache / "trees", home.tmp)
        self._roots = Cache(home.cache / "roots", home.tmp)

    def key(self, digest: str) -> str:
        """Return what names the root of the image with this digest: the same for images that have the same layers."""
        documents = self._documents(digest)
        if documents is None:
            return digest
        return documents.chain[-1] if documents.chain else _EMPTY

    def rootfs_path(self, digest: str) -> Path:
        """Return where `rootfs` puts it, without making it. Raises NotFound."""
        if digest.startswith(host.PREFIX):
            return Path("/")
        key = self.key(digest)
        return self._store.path(digest) if key == digest else self._roots.path(key) / _SQUASHFS

    def rootfs(self, digest: str, progress: Progress) -> Path:
        """Return the squashfs, made if it is not there. Raises NotFound, ImageError, EngineError, HostLacks, StorageError."""
        path = self.rootfs_path(digest)
        documents = self._documents(digest)
        if documents is not None and not path.exists():
            self._roots.get(self.key(digest), partial(self._whole, documents, progress))
        return path

    def passing_path(self, digest: str) -> tuple[Path, str]:
        """Return where `passing` puts it, without making it, and what names that. Raises NotFound."""
        path, key = self.rootfs_path(digest), self.key(digest)
        if key == digest or path.exists():
            return path, key
        return self._roots.path(_STACKED + key) / _SQUASHFS, _STACKED + key

    def passing(self, digest: str, progress: Progress) -> Path:
        """Return a root that is quickly made, but of which the bytes depend on what there is: for machines that are not kept.

        Raises what `rootfs` raises.
        """
        path, name = self.passing_path(digest)
        documents = self._documents(digest)
        if documents is None or path.exists():
            return path
        try:
            self._roots.get(name, partial(self._on_top, documents, progress))
        except stacked.Whole:
            return self.rootfs(digest, progress)
        return path

    def lower_paths(self, digest: str) -> tuple[Path, ...]:
        """Return where `lowers` puts them, without making them. Raises NotFound."""
        if digest not in self._places:
            documents = self._documents(digest)
            chain = documents.chain[::-1] if documents and documents.chain else [self.key(digest)]
            merged = self._trees.path(_MERGED + chain[0]) / ROOT
            self._places[digest] = merged, tuple(self._trees.path(name) / ROOT for name in chain)
        merged, stacked = self._places[digest]
        return (merged,) if os.path.exists(merged) else stacked  # noqa: PTH110 - a machine's verbs ask several times

    def lowers(self, digest: str, progress: Progress, *, foreign: bool = False) -> tuple[Path, ...]:
        """Return the unpacked root, made if it is not there: folders to lay over one another, the uppermost first.

        It is only looked into where an image for another platform will do (`foreign`).
        Raises NotFound, ImageError, EngineError, HostLacks, StorageError.
        """
        documents = self._documents(digest)
        if documents is not None and not foreign:
            check_platform(documents)
        paths = self.lower_paths(digest)
        if all(map(os.path.exists, paths)):
            return paths
        if digest.startswith(host.PREFIX):
            self._trees.get(digest, lambda made: host.build(made / ROOT))
        elif documents is None or not documents.chain:
            self._trees.get(self.key(digest), partial(self._make_tree, digest, progress))
        else:
            try:
                self._trees.all(documents.chain, partial(self._make_layers, documents, progress))
            except Unstackable:
                self._trees.get(_MERGED + documents.chain[-1], partial(self._make_tree, digest, progress))
        return self.lower_paths(digest)

    def lost(self, digest: str) -> str:
        """Say what the unpacked root lacks of the image, "" if nothing."""
        notes = (path.parent / _LOST for path in self.lower_paths(digest))
        return next((note.read_text().strip() for note in notes if note.exists()), "")

    def names(self, digests: Iterable[str]) -> set[str]:
        """Return the names of all that may be derived of these images; of one that is gone nothing is known.

        Raises StorageError for one that cannot be read: what it needs must not be taken for needless.
        """
        found = set()
        for digest in digests:
            with contextlib.suppress(NotFound):
                documents = self._documents(digest)
                chain = documents.chain if documents else []
                found |= {self.key(digest), *chain, *(_MERGED + name for name in chain[-1:])}
        return found

    def steps(self, without: Collection[str] = ()) -> set[str]:
        """Return the names of trees that steps of builds were made for, so that the next build finds them; but those `without`."""
        return {ref.value["chain"] for ref in self._store.refs(STEPS) if ref.name not in without and "chain" in ref.value}

    def drop(self, names: set[str]) -> None:
        """Remove what has one of these names, but for the trees of steps that are remembered."""
        kept = self.steps() if names else ()
        for name in names:
            self._drop_root(name)
            if name not in kept:
                self._trees.drop(name)

    def forget(self, digest: str, others: Iterable[str]) -> None:
        """Remove the squashfs of this image if it is of none of the `others`."""
        key = self.key(digest)
        if key not in self._keys(others):
            self._drop_root(key)

    def keep(self, needed: Callable[[], Iterable[str]]) -> list[str]:
        """Remove what is derived of other images than those with the digests `needed`, and of steps that are forgotten; say what."""

        def names() -> set[str]:
            return self.names(needed())

        return [*self._trees.keep(lambda: names() | self.steps()), *self._roots.keep(lambda: self._keys(needed()))]

    def inherit(self, squashfs: Path, digest: str) -> None:
        """Let the image with this digest have `squashfs` for its root, which it was made of."""

        def link(made: Path) -> None:
            (made / _SQUASHFS).hardlink_to(squashfs)

        self._roots.get(self.key(digest), link)

    def _keys(self, digests: Iterable[str]) -> set[str]:
        """Return the names of the squashfs of these images: unlike a tree, one is of all layers."""
        found = set()
        for digest in digests:
            with contextlib.suppress(NotFound):
                found |= {self.key(digest), _STACKED + self.key(digest)}
        return found

    def _drop_root(self, key: str) -> None:
        self._roots.drop(key)
        self._roots.drop(_STACKED + key)

    def _documents(self, digest: str) -> Documents | None:
        return None if digest.startswith(host.PREFIX) else self._library.read(digest)

    def _make_layers(self, documents: Documents, progress: Progress, work: Path, missing: list[str]) -> None:
        there = [self._trees.path(name) for name in documents.chain]
        folders = [work / path.name if name in missing else path for name, path in zip(documents.chain, there, strict=True)]
        numbers = [number for number, name in enumerate(documents.chain) if name in missing]
        lost = ""
        done = rootless.unpack_as_root(self._store, documents, folders, numbers, work, progress) if os.geteuid() != 0 else None
        if done is None:
            owners = Owners(kept=os.geteuid() == 0)
            unpack_layers(self._store, documents, folders, numbers, work, progress, owners)
            lost = LOST if owners.lost else ""
        elif done:
            lost = LOST_SOME
        for number in numbers if lost else ():
            (folders[number] / _LOST).write_text(lost + "\n")
        if lost:
            progress(lost)

    def _make_tree(self, digest: str, progress: Progress, made: Path) -> None:
        squashfs = self.rootfs(digest, progress)
        progress("unpacking the image")
        older.unsquash(squashfs, made / ROOT)
        if os.geteuid() != 0:
            (made / _LOST).write_text(LOST + "\n")

    def _on_top(self, documents: Documents, progress: Progress, made: Path) -> None:
        """Make a root out of that of the layers below. Raises Whole if there is none."""
        check_platform(documents)
        for count in range(len(documents.chain) - 1, 0, -1):
            for name in (documents.chain[count - 1], _STACKED + documents.chain[count - 1]):
                try:
                    if self._over(self._roots.path(name), documents, count, progress, made):
                        return
                except FileNotFoundError:
                    (made / _SQUASHFS).unlink(missing_ok=True)  # there is none, or none any more
        raise stacked.Whole

    def _over(self, below: Path, documents: Documents, count: int, progress: Progress, made: Path) -> bool:
        """Make a root out of the one in the folder `below`, which has the first `count` layers, if it will do. Raises Whole."""
        known = stacked.read((below / stacked.INDEX).read_bytes(), DEFAULT, documents.digest)
        if known is None or len(stacked.pieces(below / _SQUASHFS)) >= stacked.MOST - 1:
            return False
        with ExitStack() as stack:
            sources = self._read(documents, count, known.tree, progress, stack)
            known.tree.need()
            changed = known.changed()
            progress("writing what the layers add")
            squash.make(changed, sources, made / "added")
        stacked.join(below / _SQUASHFS, made / "added", made / _SQUASHFS)
        (made / "added").unlink()
        (made / stacked.INDEX).write_bytes(stacked.index(known.tree))
        (made / _SQUASHFS).chmod(0o444)
        return True

    def _whole(self, documents: Documents, progress: Progress, made: Path) -> None:
        check_platform(documents)
        tree = Tree(DEFAULT, documents.digest)
        with ExitStack() as stack:
            sources = self._read(documents, 0, tree, progress, stack)
            tree.need()
            progress("writing the root file system")
            squash.make(tree, sources, made / _SQUASHFS)
        (made / stacked.INDEX).write_bytes(stacked.index(tree))
        (made / _SQUASHFS).chmod(0o444)  # a jailed engine of another uid gets this one file

    def _read(self, documents: Documents, first: int, tree: Tree, progress: Progress, stack: ExitStack) -> list[Source]:
        """Apply the layers from number `first` on to `tree`; return where the bytes of files come from, by number of the layer."""
        sources: list[Source] = []
        for number, (layer, diff) in enumerate(zip(documents.manifest.layers, documents.config.rootfs.diff_ids, strict=True)):
            file = stack.enter_context(self._store.path(layer.digest).open("rb"))
            section = Section(file.fileno(), 0, layer.size, layer.digest)
            sources.append(LayerSource(section, DEFAULT))
            if number < first:
                continue
            progress(f"reading layer {number + 1} of {len(documents.manifest.layers)}")
            plain = Hashed(unpack(section.part(0, layer.size, layer.digest), DEFAULT), DEFAULT)
            tree.layer = number
            apply(tree, plain, number, DEFAULT, layered=True)
            if plain.digest() != diff:
                raise ImageError(f"{layer.digest}: the layer is not what the image's config says", hint="get the image again")
        return sources


def check_platform(documents: Documents) -> None:
    """Raise ImageError if the image cannot run on this host."""
    here = Platform.host()
    if not here.runs(documents.config.platform):
        raise ImageError(f"{documents.digest}: the image is for {documents.config.platform}, not {here}")
