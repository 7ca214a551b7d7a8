"""Images in archives: what `docker save` writes, and OCI image layouts, as a tar or as a folder.

Both are first read into a Tree like any root; what they hold is then looked up there, so a hostile
archive has no other way in. OCI blobs are checked against their digests (OCI image-spec, descriptor.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from trivisor.core.errors import ImageError
from trivisor.images.limits import Limits
from trivisor.images.reference import normalise
from trivisor.images.stream import CHUNK, Section, exactly
from trivisor.images.tree import Content, Tree

T = TypeVar("T")


class Descriptor(msgspec.Struct):
    """Names a blob."""

    digest: str
    size: int
    media_type: str = msgspec.field(name="mediaType", default="")
    platform: dict[str, Any] | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct):
    """index.json, or an index among the blobs."""

    manifests: list[Descriptor]


class Manifest(msgspec.Struct):
    """One image: its config and its layers, the lowest first."""

    config: Descriptor
    layers: list[Descriptor]


class Saved(msgspec.Struct, rename="pascal"):
    """One image of `docker save`'s manifest.json."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class Process(msgspec.Struct, rename="pascal"):
    """How the image wants to be run (OCI image-spec, config.md)."""

    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None


class Config(msgspec.Struct):
    """The config blob."""

    architecture: str = "amd64"
    os: str = "linux"
    config: Process | None = None


@dataclass
class Packed:
    """An image found in an archive: its layers, the lowest first, and how it wants to be run."""

    layers: list[Section]
    config: dict[str, Any] = field(default_factory=dict)


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

    def image(self, reference: str) -> Packed:
        """Return the one image, or the one that is called `reference`. Raises ImageError."""
        if "manifest.json" in self._tree.root.children:
            return self._saved(reference)
        return self._layout(reference)

    def _saved(self, reference: str) -> Packed:
        images = self._document("manifest.json", list[Saved])
        chosen = self._choose([(image, image.repo_tags or []) for image in images], reference)
        config = self._document(chosen.config, Config)
        return Packed([self._member(layer) for layer in chosen.layers], self._process(config))

    def _layout(self, reference: str) -> Packed:
        found = self._document("index.json", Index).manifests
        for _ in range(4):  # an index may name indexes, one for each platform
            found = [one for one in found if (one.platform or {}).get("architecture", "amd64") == "amd64"]
            names = [(one, [(one.annotations or {}).get("org.opencontainers.image.ref.name", "")]) for one in found]
            chosen = self._choose(names, reference)
            document = self._blob(chosen)
            if "index" not in chosen.media_type and "manifest.list" not in chosen.media_type:
                break
            found = self._parse(document, Index, chosen.digest).manifests
        manifest = self._parse(document, Manifest, chosen.digest)
        for layer in manifest.layers:
            if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
                raise self._tree.bad(layer.digest, "is a foreign layer, which is not in the archive")
        config = self._parse(self._blob(manifest.config), Config, manifest.config.digest)
        return Packed([self._blob(layer) for layer in manifest.layers], self._process(config))

    def _choose(self, images: list[tuple[T, list[str]]], reference: str) -> T:
        named = [image for image, names in images if reference in {_normal(name) for name in names}]
        candidates = named or [image for image, _ in images]
        if len(candidates) != 1:
            known = ", ".join(sorted({name for _, names in images for name in names if name})) or "none has a name"
            hint = f"import it under the name of one of them: {known}" if images else "it may be for another processor"
            raise ImageError(f"{self._tree.origin}: it holds {len(images)} images for this machine, not one", hint=hint)
        return candidates[0]

    def _process(self, config: Config) -> dict[str, Any]:
        if (config.os, config.architecture) != ("linux", "amd64"):
            raise ImageError(f"{self._tree.origin}: the image is for {config.os}/{config.architecture}, not linux/amd64")
        wish = config.config or Process()
        env = dict(pair.split("=", 1) for pair in wish.env or () if "=" in pair and "\0" not in pair)
        given = {"env": env, "entrypoint": wish.entrypoint, "cmd": wish.cmd, "user": wish.user, "workdir": wish.working_dir}
        return {key: value for key, value in given.items() if value}

    def _member(self, name: str) -> Section:
        node = self._tree.find(name)
        if node is None or node.content is None or node.content.sparse is not None:
            raise self._tree.bad(name, "is named by the manifest and is not in the archive")
        return self._section(node.content, f"{self._tree.origin}: {name}")

    def _blob(self, descriptor: Descriptor) -> Section:
        algorithm, _, digits = descriptor.digest.partition(":")
        if algorithm not in ("sha256", "sha512") or not digits.isalnum():
            raise self._tree.bad(descriptor.digest, "is not a digest")
        section = self._member(f"blobs/{algorithm}/{digits}")
        size = section.end - section.start
        sha = hashlib.new(algorithm)
        while data := section.read(CHUNK):
            sha.update(data)
        if size != descriptor.size or sha.hexdigest() != digits:
            raise self._tree.bad(descriptor.digest, "the blob is damaged: its digest or size is another")
        return section.part(0, size, section.name)

    def _document(self, name: str, kind: type[T]) -> T:
        return self._parse(self._member(name), kind, name)

    def _parse(self, section: Section, kind: type[T], name: str) -> T:
        size = section.end - section.start
        if size > self._limits.document:
            raise self._tree.bad(name, f"a document of {size} bytes is over the limit of {self._limits.document}")
        try:
            return msgspec.json.decode(exactly(section, size, name), type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._tree.bad(name, f"is malformed: {error}") from error


def _normal(name: str) -> str:
    try:
        return normalise(name)
    except ValueError:
        return ""
