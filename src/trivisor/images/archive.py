"""Images in archives: what `docker save` writes, and OCI image layouts, as a tar or as a folder.

Both are first read into a Tree like any root; what they hold is then looked up there, so a hostile
archive has no other way in. OCI blobs are checked against their digests (OCI image-spec, descriptor.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from trivisor.core.errors import ImageError
from trivisor.images.limits import Limits
from trivisor.images.model import (
    INDEXES,
    REF_NAME,
    Descriptor,
    ImageConfig,
    Index,
    Platform,
    check_descriptor,
    choose,
    decode,
    read_manifest,
)
from trivisor.images.reference import normalise
from trivisor.images.stream import CHUNK, Section, exactly
from trivisor.images.tree import Content, Tree

T = TypeVar("T")
_DEPTH = 4
"""Indexes in an index: none is known that needs more."""


class Saved(msgspec.Struct, rename="pascal"):
    """One image of `docker save`'s manifest.json."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


@dataclass
class Packed:
    """An image found in an archive: its layers, the lowest first, and its documents. `docker save` has no manifest."""

    layers: list[Section]
    config: bytes
    manifest: bytes = b""
    media_type: str = ""


class Archive:
    """A tree that may be an image archive; `section` opens the bytes of one of its files."""

    def __init__(self, tree: Tree, section: Callable[[Content, str], Section], limits: Limits) -> None:
        self._tree = tree
        self._section = section
        self._limits = limits

    @staticmethod
    def holds(tree: Tree) -> bool:
        """Tell whether `tree` looks like an image archive, and not like a root that has such a file in it."""
        names = tree.root.children.keys()
        return ("manifest.json" in names or {"oci-layout", "index.json"} <= names) and not {"bin", "etc", "usr"} & names

    @property
    def origin(self) -> str:
        """What messages begin with."""
        return self._tree.origin

    @property
    def _is_layout(self) -> bool:
        # Docker since 25 writes both; its layout says more.
        return {"oci-layout", "index.json"} <= self._tree.root.children.keys()

    def image(self, reference: str, platform: Platform) -> Packed:
        """Return the one image, or the one that is called `reference`, for `platform`. Raises ImageError."""
        found = self._layout(reference, platform) if self._is_layout else self._saved(reference)
        config = decode(found.config, ImageConfig, self.origin, self._limits)
        if not platform.runs(config.platform):
            raise ImageError(f"{self.origin}: the image is for {config.platform}, not {platform}")
        return found

    def every(self, platform: Platform) -> list[tuple[list[str], Packed]]:
        """Return each image for `platform` with the names that the archive gives it. Raises ImageError if there is none."""
        if not self._is_layout:
            found = [(image.repo_tags or [], self._packed(image)) for image in self._document("manifest.json", list[Saved])]
        else:
            names: dict[str, list[str]] = {}
            entries = self._document("index.json", Index).manifests
            for one in (fitting := self._fitting(entries, platform)):
                names.setdefault(one.digest, []).extend(_names(one)[:1])
            found = [(names[one.digest], self._resolved(one, platform)) for one in {one.digest: one for one in fitting}.values()]
        there = [(decode(packed.config, ImageConfig, self.origin, self._limits).platform, called, packed) for called, packed in found]
        if not any(platform.runs(other) for other, _, _ in there):
            others = ", ".join(sorted({str(other) for other, _, _ in there}))
            raise ImageError(f"{self.origin}: it holds no image for {platform}", hint=f"it has some for: {others}" if others else "")
        return [(called, packed) for other, called, packed in there if platform.runs(other)]

    def _saved(self, reference: str) -> Packed:
        images = self._document("manifest.json", list[Saved])
        return self._packed(self._choose([(image, image.repo_tags or []) for image in images], reference))

    def _packed(self, image: Saved) -> Packed:
        return Packed([self._member(layer) for layer in image.layers], self._bytes(self._member(image.config), image.config))

    def _layout(self, reference: str, platform: Platform) -> Packed:
        found = self._document("index.json", Index).manifests
        chosen = self._choose([(one, _names(one)) for one in self._fitting(found, platform)], reference)
        return self._resolved(chosen, platform, reference)

    def _fitting(self, found: list[Descriptor], platform: Platform) -> list[Descriptor]:
        return [one for one in found if one.platform is None or platform.runs(one.platform)]

    def _resolved(self, chosen: Descriptor, platform: Platform, reference: str = "") -> Packed:
        """Return the image that an entry of the index means: itself, or of an index that it names the one for `platform`."""
        for _ in range(_DEPTH):
            document = self._bytes(self._blob(chosen), chosen.digest)
            if chosen.media_type not in INDEXES:
                break
            found = decode(document, Index, self._about(chosen.digest), self._limits).manifests
            named = [(one, _names(one)) for one in found]
            chosen = choose(found, platform, self.origin) if any(one.platform for one in found) else self._choose(named, reference)
        manifest = read_manifest(document, chosen.media_type, self._about(chosen.digest), self._limits)
        config = self._bytes(self._blob(manifest.config), manifest.config.digest)
        return Packed([self._blob(layer) for layer in manifest.layers], config, document, chosen.media_type)

    def _choose(self, images: list[tuple[T, list[str]]], reference: str) -> T:
        tag = reference.rpartition(":")[2]
        named = [image for image, names in images if reference in {_normal(name) for name in names}]
        named = named or [image for image, names in images if tag in names]
        candidates = named or [image for image, _ in images]
        if len(candidates) != 1:
            known = ", ".join(sorted({name for _, names in images for name in names if name})) or "none has a name"
            hint = f"import it under the name of one of them: {known}" if images else "it may be for another processor"
            raise ImageError(f"{self._tree.origin}: it holds {len(images)} images for this machine, not one", hint=hint)
        return candidates[0]

    def _member(self, name: str) -> Section:
        node = self._tree.find(name)
        if node is None or node.content is None or node.content.sparse is not None:
            raise self._tree.bad(name, "is named by the manifest and is not in the archive")
        return self._section(node.content, f"{self._tree.origin}: {name}")

    def _blob(self, descriptor: Descriptor) -> Section:
        check_descriptor(descriptor, self.origin)
        digits = descriptor.digest.partition(":")[2]
        section = self._member(f"blobs/sha256/{digits}")
        size = section.end - section.start
        sha = hashlib.sha256()
        while data := section.read(CHUNK):
            sha.update(data)
        if size != descriptor.size or sha.hexdigest() != digits:
            raise self._tree.bad(descriptor.digest, "the blob is damaged: its digest or size is another")
        return section.part(0, size, section.name)

    def _document(self, name: str, kind: type[T]) -> T:
        return decode(self._bytes(self._member(name), name), kind, self._about(name), self._limits)

    def _bytes(self, section: Section, name: str) -> bytes:
        size = section.end - section.start
        if size > self._limits.document:
            raise self._tree.bad(name, f"a document of {size} bytes is over the limit of {self._limits.document}")
        return exactly(section, size, name)

    def _about(self, name: str) -> str:
        return f"{self.origin}: {name[:200]!r}"


def whole_name(name: str, base: str, source: Path) -> str:
    """Return a name that an archive has for an image, in full: one that is but a tag is put behind `base`, or the file's own name.

    Raises ImageError for an image that has none.
    """
    if not name:
        raise ImageError(f"{source}: an image in it has no name", hint=f"`trivisor import {source} NAME` gives it one")
    if ":" in name or "/" in name:
        return name
    whole = f"{base or source.absolute().name.partition('.')[0].lower()}:{name}"
    if not base and not _normal(whole):
        raise ImageError(f"{source}: its image has the tag {name[:80]!r}, and no name", hint="give it one with --base")
    return whole


def _names(descriptor: Descriptor) -> list[str]:
    notes = descriptor.annotations or {}
    return [notes[key] for key in ("io.containerd.image.name", REF_NAME) if notes.get(key)]


def _normal(name: str) -> str:
    try:
        return normalise(name)
    except ValueError:
        return ""
