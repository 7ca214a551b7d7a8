"""What images take of the disk, whether they are whole, and what of it all nobody needs.

A blob is stored once, whichever images have it, so what one image takes has two figures: all its blobs, and those that no other
image has. Beside images there are layers that builds made (refs "build:*"), roots (derived.py), and what interrupted downloads left.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.errors import CallerError, NotFound, StorageError
from trivisor.core.paths import Home
from trivisor.images import host
from trivisor.images.derived import STEPS, Derived
from trivisor.images.documents import Documents, Library
from trivisor.images.image import PREFIX, Image
from trivisor.images.registry import partial
from trivisor.store.faults import translated
from trivisor.store.store import Ref, Store


@dataclass(frozen=True)
class ImageUse:
    """What one image takes, in bytes: `size` is all its blobs, `own` those that no other image has, `roots` what is unpacked of it.

    `names` is empty for one that lost its name while a machine has it; `used_by` says who has it, "machine:ID".
    """

    digest: str
    names: tuple[str, ...]
    size: int
    own: int
    roots: int
    created: float
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """One kind of thing: how many, their bytes, and how many of these `prune(everything=True)` would free."""

    count: int
    size: int
    reclaimable: int


@dataclass(frozen=True)
class Usage:
    """What the images of a home take of its disk."""

    images: list[ImageUse]
    blobs: Share
    """The images' blobs, each once."""
    build: Share
    """Layers of build steps that no image has; `count` is of all steps that are remembered."""
    roots: Share
    downloads: Share
    """What interrupted pulls left, and running ones have."""
    rest: Share
    """Blobs that no name reaches: those of work under way, and what nobody needs."""

    @property
    def size(self) -> int:
        return sum(share.size for share in (self.blobs, self.build, self.roots, self.downloads, self.rest))

    @property
    def reclaimable(self) -> int:
        return sum(share.reclaimable for share in (self.blobs, self.build, self.roots, self.downloads, self.rest))


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed: names of images, how many build steps, and bytes in all. `kept` says what it could not look at, and why."""

    images: list[str]
    steps: int
    freed: int
    kept: list[str]


@dataclass(frozen=True)
class Wishes:
    """What to prune: `Images.prune`."""

    everything: bool
    older: float
    """Seconds."""
    labels: Mapping[str, str | None]

    @property
    def limit(self) -> float:
        """Seconds since the epoch."""
        return time.time() - self.older


class Upkeep:
    """The images of one home, weighed, checked and cleared away."""

    def __init__(self, home: Home, store: Store, library: Library, derived: Derived) -> None:
        self._store = store
        self._library = library
        self._derived = derived
        self._caches = (home.cache / "trees", home.cache / "roots")

    # Figures

    def usage(self) -> Usage:
        """Weigh all. Raises StorageError."""
        sizes = self._store.sizes()
        refs = self._store.refs()
        used: dict[str, list[str]] = {}
        for digest, owner in self._store.pins():
            used.setdefault(digest, []).append(owner)
        named: dict[str, list[Ref]] = {}
        for ref in refs:
            if ref.name.startswith(PREFIX):
                named.setdefault(ref.digest, []).append(ref)
        needs = {digest: self._needs(digest) & sizes.keys() for digest in {**named, **used} if digest in sizes}
        shared = Counter(blob for blobs in needs.values() for blob in blobs)
        roots = self._roots()
        images = [
            ImageUse(
                digest,
                tuple(ref.name.removeprefix(PREFIX) for ref in named.get(digest, ())),
                sum(sizes[blob] for blob in blobs),
                sum(sizes[blob] for blob in blobs if shared[blob] == 1),
                sum(roots.get(name, 0) for name in self._root_names([digest])),
                min((ref.value["created"] for ref in named.get(digest, ())), default=0.0),
                tuple(sorted(used.get(digest, ()))),
            )
            for digest, blobs in needs.items()
        ]
        busy = {blob for image in images if image.used_by for blob in needs[image.digest]}
        steps = [ref for ref in refs if ref.name.startswith(STEPS)]
        built = {ref.digest for ref in steps} & sizes.keys() - shared.keys()
        rest = sizes.keys() - shared.keys() - built
        waste = rest - self._store.reached()
        pieces = _files(partial.folder(self._store))
        needed = self._root_names(image.digest for image in images if image.used_by)
        return Usage(
            sorted(images, key=lambda image: image.names),
            Share(len(images), _sum(sizes, shared), _sum(sizes, shared.keys() - busy)),
            Share(len(steps), _sum(sizes, built), _sum(sizes, built)),
            Share(len(roots), sum(roots.values()), sum(size for name, size in roots.items() if name not in needed)),
            Share(len(pieces), sum(pieces), sum(pieces)),
            Share(len(rest), _sum(sizes, rest), _sum(sizes, waste)),
        )

    def about(self, image: Image) -> dict[str, Any]:
        """Return all that is known of an image, as plain values."""
        refs = self._store.refs(PREFIX)
        documents = None if image.digest.startswith(host.PREFIX) else self._library.read(image.digest)
        chain = documents.config.rootfs.diff_ids if documents else []
        lowers = [path for path in self._derived.lower_paths(image.digest) if path.exists()]
        config = image.config
        return {
            "name": image.name,
            "names": [ref.name.removeprefix(PREFIX) for ref in refs if ref.digest == image.digest],
            "digest": image.digest,
            "config_digest": documents.manifest.config.digest if documents else "",
            "media_type": image.media_type,
            "platform": str(config.platform),
            "size": image.size,
            "created": image.created,
            "built": config.created,
            "author": config.author,
            "source": image.source,
            "annotations": documents.manifest.annotations or {} if documents else {},
            "config": msgspec.to_builtins(config.run),
            "layers": [
                {
                    "digest": layer.digest,
                    "media_type": layer.media_type,
                    "size": layer.size,
                    "diff_id": diff,
                    "in": self._others(layer.digest, image, refs),
                }
                for layer, diff in zip(image.layers, chain, strict=False)
            ],
            "history": [msgspec.to_builtins(step) for step in image.history],
            "roots": {"squashfs": str(image.rootfs) if image.rootfs.exists() else None, "trees": [str(path) for path in lowers]},
            "used_by": sorted(owner for digest, owner in self._store.pins() if digest == image.digest),
        }

    def _others(self, blob: str, image: Image, refs: list[Ref]) -> list[str]:
        """Return the names of other images that have the layer."""
        return [ref.name.removeprefix(PREFIX) for ref in refs if ref.digest != image.digest and blob in self._needs(ref.digest)]

    def _needs(self, digest: str) -> set[str]:
        with suppress(NotFound, StorageError):
            documents = self._library.read(digest)
            return {digest, *(blob.digest for blob in documents.blobs)} if documents else {digest}
        return {digest}

    def _roots(self) -> dict[str, int]:
        """Return the bytes on disk of each root, by the name of its folder."""
        found: Counter[str] = Counter()
        for cache in self._caches:
            for path in _entries(cache):
                if not path.name.endswith(".lock"):
                    found[path.name] += weight(path)
        return found

    def _root_names(self, digests: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for digest in digests:
            with suppress(StorageError):
                found |= {name.replace(":", "-") for name in self._derived.names([digest])}
        return found

    # Health

    def check(self) -> list[str]:
        """Read every blob of every image again; return what is damaged or missing, in words."""
        names: dict[str, list[str]] = {}
        said: dict[str, str] = {}
        for ref in self._store.refs(PREFIX):
            names.setdefault(ref.digest, []).append(ref.name.removeprefix(PREFIX))
        for digest, called in names.items():
            blobs = [digest]
            try:
                documents = Library(self._store).read(digest)
                blobs += [blob.digest for blob in documents.blobs] if documents else []
            except (NotFound, StorageError) as error:
                said[digest] = f"{', '.join(called)}: {error}"
            for blob in blobs:
                if blob not in said and (why := self._store.damage(blob)):
                    said[blob] = f"{', '.join(called)}: {why}"
        return list(said.values())

    # Clearing away

    def would_prune(self, wishes: Wishes, needed: Callable[[set[str]], Iterable[str]]) -> Pruned:
        """Return what `prune` would remove now; `needed` says of which images roots would stay without these refs. Raises StorageError."""
        images = self._images_to_drop(wishes)
        steps = self._steps_to_drop(wishes, images)
        without = {*images, *steps}
        sizes = self._store.sizes()
        freed, kept = _sum(sizes, sizes.keys() - self._store.reached(without)), []
        try:
            stay = {name.replace(":", "-") for name in self._derived.names(needed(without)) | self._derived.steps(without)}
            freed += sum(size for name, size in self._roots().items() if name not in stay)
        except StorageError as error:
            kept.append(f"roots: {error}")
        freed += partial.tidy(self._store, wishes.older, dry_run=True)
        return Pruned([name.removeprefix(PREFIX) for name in images], len(steps), freed, kept)

    def prune(self, wishes: Wishes, needed: Callable[[], Iterable[str]]) -> Pruned:
        """Remove what nobody needs; `needed` says of which images roots must stay. Raises StorageError."""
        removed = [name.removeprefix(PREFIX) for name in self._drop(self._images_to_drop(wishes))]
        steps = len(self._drop(self._steps_to_drop(wishes, ())))
        before = sum(self._roots().values())
        freed, kept = self._store.collect(), []
        try:
            self._derived.keep(needed)
        except StorageError as error:
            kept.append(f"roots: {error}")
        freed += max(before - sum(self._roots().values()), 0)
        return Pruned(removed, steps, freed + partial.tidy(self._store, wishes.older), kept)

    def _images_to_drop(self, wishes: Wishes) -> list[str]:
        if not wishes.everything:
            return []
        used, limit = {digest for digest, _ in self._store.pins()}, wishes.limit
        old = [ref for ref in self._store.refs(PREFIX) if ref.digest not in used and ref.value["created"] <= limit]
        return [ref.name for ref in old if self._labelled(ref.digest, wishes.labels)]

    def _steps_to_drop(self, wishes: Wishes, without: Collection[str]) -> list[str]:
        """Return the steps whose layer no image has (but those `without`), for that is what they cost, or all."""
        kept = {blob for ref in self._store.refs(PREFIX) if ref.name not in without for blob in self._needs(ref.digest)}
        limit = wishes.limit
        return [
            ref.name for ref in self._store.refs(STEPS) if ref.value["created"] <= limit and (wishes.everything or ref.digest not in kept)
        ]

    def _drop(self, names: Iterable[str]) -> list[str]:
        dropped = []
        for name in names:
            # A machine may have taken it just now: its last name is then refused, and stays.
            with suppress(NotFound, CallerError):
                self._store.drop_ref(name)
                dropped.append(name)
        return dropped

    def _labelled(self, digest: str, labels: Mapping[str, str | None]) -> bool:
        if not labels:
            return True
        documents: Documents | None = None
        with suppress(NotFound, StorageError):
            documents = self._library.read(digest)
        have = documents.config.labels if documents else {}
        return all(key in have and value in (None, have[key]) for key, value in labels.items())


def _sum(sizes: Mapping[str, int], blobs: Iterable[str]) -> int:
    return sum(sizes[blob] for blob in blobs)


def _entries(folder: Path) -> list[Path]:
    try:
        with translated(folder):
            return sorted(folder.iterdir())
    except StorageError:
        return []


def _files(folder: Path) -> list[int]:
    """Return the bytes of each file."""
    found = []
    for path in _entries(folder):
        with suppress(FileNotFoundError):  # done, and gone
            found.append(path.stat().st_size)
    return found


def weight(tree: Path) -> int:
    """Return the bytes that a tree takes on the disk, a file of several names once."""
    seen: set[int] = set()
    total, stack = 0, [str(tree)]
    while stack:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(stack.pop()) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                if facts.st_ino not in seen:
                    seen.add(facts.st_ino)
                    total += facts.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
    return total
