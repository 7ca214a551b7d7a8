"""The images of a home: names, and what they mean.

A name is a ref of the store ("image:debian:latest") whose blob is the manifest of an OCI image; the manifest is linked to its config
and its layers, which lie in the store as they came, each once. Nothing here locks: what makes an image works in a workspace whose
lease holds its blobs, and the name is set in one transaction, so of two that make the same name at once the later one is meant from
then on, and both are whole. A machine pins the digest it was created from, and keeps it when the name moves on.
"""

from __future__ import annotations

import builtins
import re
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Unpack

from trivisor.core.errors import CallerError, ImageError, InvalidSpec, NotFound, StorageError
from trivisor.core.paths import Home
from trivisor.images import bootstrap, host, model, older, outlet
from trivisor.images.archive import whole_name
from trivisor.images.derived import Derived, Progress
from trivisor.images.documents import Documents, Library
from trivisor.images.image import PREFIX, Image
from trivisor.images.intake import Bytes, Intake
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.model import Descriptor, History, ImageConfig, Manifest, Platform
from trivisor.images.reference import Reference, normalise
from trivisor.images.rooted import Rooted
from trivisor.images.upkeep import Pruned, Upkeep, Usage, Wishes
from trivisor.store.store import Ref, Store
from trivisor.store.workspace import Workspace

if TYPE_CHECKING:
    from trivisor.images.registry.access import Access
    from trivisor.images.registry.crew import Report

__all__ = ["Image", "Images"]
_DIGITS = re.compile(r"(?:sha256:)?[0-9a-f]{6,64}")
"""A digest, or the beginning of one, as lists show it."""


class Images(Rooted):
    """The catalog of one home. Safe to use from threads, forks and many processes at once."""

    def __init__(
        self, home: Home, *, noted: Callable[[Image], object] = lambda _: None, needs: Callable[[], Iterable[str]] = tuple
    ) -> None:
        """`noted` is told of each image that is made; `needs` says what machines have, also of the host's root."""
        self._store = Store(home.store)
        self._library = Library(self._store)
        self._derived = Derived(home, self._store, self._library)
        self._upkeep = Upkeep(home, self._store, self._library, self._derived)
        self._noted = noted
        self._needs = needs

    # Names

    def get(self, ref: str) -> Image:
        """Return the image called `ref`, or with that digest; "host" is the host's own root (host.py).

        Raises NotFound, InvalidSpec, StorageError if it is damaged.
        """
        if ref == host.NAME:
            return Image(host.NAME, host.digest(), Path("/"), 0, 0.0, "this host")
        image = self._find(ref)
        while damaged := self._library.lacking(image.digest, image.size):
            # The name may have moved on, and the old blobs with it, since it was looked up.
            found = self._find(ref)
            if found == image:
                raise StorageError(f"image {image.name} is damaged ({damaged})", hint="get the image again")
            image = found
        return image

    def list(self) -> list[Image]:
        """Return every image, by name."""
        return [self._image(ref) for ref in self._store.refs(PREFIX)]

    def add(self, manifest: bytes, media_type: str, name: str, source: str, workspace: Workspace) -> Image:
        """Register an image whose blobs are all in the store: the one door for what is pulled, loaded, built, committed, imported.

        `name` is what it is called from now on ("": nothing; then it is there for as long as the workspace, or who pins it);
        `source` says where it came from. Raises ImageError for what is not an image or lacks a blob, InvalidSpec, StorageError.
        """
        name = name and _free(name)
        read = model.read_manifest(manifest, media_type, name or source)
        for blob in (read.config, *read.layers):
            self._hold(blob, workspace, name or source)
        model.read_config(self._store.path(read.config.digest).read_bytes(), read, name or source)
        links = [read.config.digest, *(layer.digest for layer in read.layers)]
        digest = self._store.add(Bytes(manifest), workspace.owner, links=links)
        value = {"created": time.time(), "source": source, "media_type": media_type or read.media_type or model.OCI_MANIFEST}
        if not name:
            return self._image(Ref(PREFIX, digest, value))
        image = self._name(Ref(PREFIX + name, digest, value))
        self._noted(image)
        return image

    def tag(self, ref: str, name: str) -> Image:
        """Give the image called `ref` another name as well. Raises NotFound, InvalidSpec."""
        image, name = self._find(ref), _free(name)
        value = next(one.value for one in self._store.refs(PREFIX + image.name) if one.name == PREFIX + image.name)
        return self._name(Ref(PREFIX + name, image.digest, value))

    def remove(self, ref: str, *, force: bool = False) -> None:
        """Forget the name, and the image with its last name; by digest one of a single name.

        With `force` by digest all of its names, and the last one even if a machine was made from the image, which then stays for as long
        as that machine. Raises NotFound, else CallerError.
        """
        image = self._find(ref)
        names = [found.name.removeprefix(PREFIX) for found in self._store.refs(PREFIX) if found.digest == image.digest]
        by_digest = _DIGITS.fullmatch(ref) or model.is_digest(ref)
        if len(names) > 1 and by_digest and not force:
            raise CallerError(f"{ref} has {len(names)} names", hint=f"remove it by name: {', '.join(names)}")
        for name in (by_digest and names) or [image.name]:
            self._store.drop_ref(PREFIX + name, force=force)
        self._clean(image.digest)

    # Making

    @property
    def store(self) -> Store:
        """Where the blobs are."""
        return self._store

    def workspace(self) -> AbstractContextManager[Workspace]:
        """A folder to make an image in; blobs that are added with its `owner` stay until `add` or its end."""
        return self._store.workspace()

    def import_(
        self, source: Path, name: str, *, platform: Platform | None = None, progress: Progress = lambda _: None, limits: Limits = DEFAULT
    ) -> Image:
        """Make an image of a folder, a tar (plain, gzip, zstd, bzip2, xz), a `docker save` archive or an OCI layout.

        Raises ImageError for what cannot be read or is not safe, StorageError, InvalidSpec.
        """
        name = _free(name)
        with self.workspace() as work:
            return self._take(work, Path(source), name, str(source), "import", platform, progress, limits)

    def bootstrap(
        self,
        name: str = "debian",
        suite: str = "bookworm",
        packages: Sequence[str] = ("python3-minimal",),
        *,
        progress: Progress = lambda _: None,
        limits: Limits = DEFAULT,
    ) -> Image:
        """Make a minimal Debian root of `suite` with `packages` (mmdebstrap(1)); takes some 20 s and the network.

        Raises HostLacks, EngineError with mmdebstrap's last output, and what `import_` raises.
        """
        name = _free(name)
        with self.workspace() as work:
            archive = work.path / "bootstrap.tar"
            bootstrap.debian(archive, suite, packages, limits, progress)
            source = f"mmdebstrap {suite} {' '.join(packages)}".strip()
            return self._take(work, archive, name, source, source, None, progress, limits)

    def load(
        self,
        source: Path,
        *,
        base: str = "",
        platform: Platform | None = None,
        progress: Progress = lambda _: None,
        limits: Limits = DEFAULT,
    ) -> builtins.list[Image]:
        """Take all images of an archive or an OCI layout (`save`, `export`, `docker save`, skopeo), under the names that it gives them.

        `base` is the name of those that have a tag alone; without it that of the file. Raises ImageError, also for an image without
        a name; StorageError, InvalidSpec.
        """
        with self.workspace() as work, Intake(self._store, work, limits, progress) as intake:
            found = intake.every(Path(source), platform or Platform.host())
            named = [(whole_name(name, base, Path(source)), manifest, kind) for names, manifest, kind in found for name in names or [""]]
            return [self.add(manifest, kind, _free(name), str(source), work) for name, manifest, kind in named]

    # Leaving

    def export(
        self, ref: str, target: Path, *, tag: str = "", archive: bool | None = None, oci: bool = False, report: Report = lambda _: None
    ) -> str:
        """Write the image called `ref` as an OCI layout: a folder, new or a layout that it is added to, or one tar; return its digest.

        `archive` says which; without it a target that ends in .tar is one. `tag` is what it is called there. With `oci` one that has
        Docker's manifest gets OCI's, and with that another digest. Nothing half-made is left where it ends early. Raises NotFound,
        AlreadyExists, InvalidSpec, ImageError, StorageError.
        """
        target = Path(target)
        with self.workspace() as work:
            image = self._leaving(ref, work, tag)
            image = outlet.as_oci(image, self._store, work.owner) if oci else image
            if target.suffix == ".tar" if archive is None else archive:
                outlet.to_archive(self._store, [image], target, report, docker=False)
            else:
                outlet.to_folder(self._store, [image], target, report)
            return image.documents.digest

    def save(self, refs: Sequence[str], target: Path | BinaryIO, *, report: Report = lambda _: None) -> None:
        """Write images into an archive that `load`, `docker load` and skopeo (docker-archive:) read: a file, or a stream.

        Raises what `export` raises; of a stream OSError.
        """
        with self.workspace() as work:
            images = [self._leaving(ref, work) for ref in refs]
            outlet.to_archive(self._store, images, target, report, docker=True)

    # Registries

    def pull(self, name: str, *, platform: Platform | None = None, **access: Unpack[Access]) -> Image:
        """Get the image called `name` from its registry, or what of it is not here; the one for `platform` (this host's).

        `access`: credentials, insecure, report, bounds. Raises NotFound, RegistryError, ImageError, InvalidSpec, StorageError.
        """
        # Here, since Python may be one without ssl (Debian's minimal one), which runs machines all the same; and it takes a while.
        from trivisor.images.registry.pull import pull

        whole = _free(name)
        with self.workspace() as work:
            pulled = pull(Reference.parse(name), self._store, work, platform=platform, **access)
            return self.add(pulled.manifest, pulled.media_type, whole, pulled.source, work)

    def push(self, ref: str, target: str = "", **access: Unpack[Access]) -> str:
        """Send the image called `ref` to the registry of its name, or of `target`; return its digest. `access` as of `pull`.

        Raises NotFound, RegistryError, InvalidSpec, StorageError; ImageError for one made before images were OCI images.
        """
        from trivisor.images.registry.push import neighbours, push

        image = self.get(ref)
        self.documents(image.digest)
        to = Reference.parse(target or image.name)
        near = neighbours(to, image.source)
        return push(to, self._store, image.digest, media_type=image.media_type, mount_from=near, **access)

    # What an image is

    def documents(self, digest: str) -> Documents:
        """Return manifest (struct and bytes), config and chain of the image with this digest.

        One of an older home becomes an OCI image, in some seconds (older.py), of another digest. Raises NotFound, StorageError, ImageError.
        """
        return self._library.read(digest) or self._converted(digest)

    def config(self, digest: str) -> ImageConfig:
        """Return the config of the image with this digest, whatever its layers are like. Raises NotFound, StorageError."""
        return (self._library.read(digest) or self._find(digest)).config

    def manifest(self, digest: str) -> Manifest:
        """Return its manifest. Raises what `documents` raises."""
        return self.documents(digest).manifest

    def layers(self, digest: str) -> tuple[Descriptor, ...]:
        """Return its layers, the lowest first. Raises what `documents` raises."""
        return tuple(self.manifest(digest).layers)

    def history(self, ref: str) -> builtins.list[History]:
        """Return how the image called `ref`, or with that digest, came about, the oldest step first. Raises what `documents` raises."""
        return self.documents(self._find(ref).digest).config.history or []

    def inspect(self, ref: str) -> dict[str, Any]:
        """Return all that is known of the image called `ref`, as plain values. Raises what `get` raises."""
        return self._upkeep.about(self.get(ref))

    # Keeping

    def sweep(self, needed: Callable[[], Iterable[str]]) -> builtins.list[str]:
        """Remove roots of images that are gone, and of the host as it was but for those `needed`; say what."""
        return self._derived.keep(lambda: self._needed(needed()))

    def pin(self, image: Image, owner: str, *, durable: bool = True) -> None:
        """Keep the image until `owner` unpins it; without `durable` until a power cut at most. Raises NotFound if it is gone."""
        if not image.digest.startswith(host.PREFIX):
            self._store.pin(image.digest, owner, durable=durable)

    def unpin(self, owner: str) -> None:
        """Drop the owner's pins. Images that nobody needs any more go at the next collection."""
        self._store.unpin(owner)

    def close(self) -> None:
        """Let go of the store; it is opened again when needed."""
        self._store.close()

    def collect(self) -> int:
        """Remove blobs that nobody needs, and what crashes left. Return the bytes freed."""
        return self._store.collect()

    def check(self) -> builtins.list[str]:
        """Read every blob of every image again; return what is damaged or missing, in words. Takes as long as the disk does."""
        return self._upkeep.check()

    def usage(self) -> Usage:
        """Weigh the images, what was made of them and for them. Raises StorageError."""
        return self._upkeep.usage()

    def prune(
        self, *, everything: bool = False, older: float = 0.0, labels: Mapping[str, str | None] | None = None, dry_run: bool = False
    ) -> Pruned:
        """Remove what no image and no machine needs: blobs, roots, pieces of downloads, and layers of build steps that no image has.

        With `everything` also images without a machine, and all build steps; both, and downloads, only if `older` than so many
        seconds, images only if they have the `labels` (None: with any value). Safe beside all else. With `dry_run` nothing is
        removed, and what would be is returned. Raises StorageError.
        """
        wishes = Wishes(everything, older, labels or {})
        if dry_run:
            return self._upkeep.would_prune(wishes, lambda without: self._needed(self._needs(), without))
        return self._upkeep.prune(wishes, lambda: self._needed(self._needs()))

    # Inside

    def _take(
        self, work: Workspace, source: Path, name: str, origin: str, by: str, platform: Platform | None, progress: Progress, limits: Limits
    ) -> Image:
        with Intake(self._store, work, limits, progress) as intake:
            manifest, media_type = intake.take(source, name, platform or Platform.host(), by)
        return self.add(manifest, media_type, name, origin, work)

    def _leaving(self, ref: str, work: Workspace, tag: str = "") -> outlet.Leaving:
        """Return what is to be written of the image, whose blobs stay for as long as the workspace."""
        documents = self.documents(self.get(ref).digest)
        self._store.pin(documents.digest, work.owner, durable=False)
        image = self._find(documents.digest if model.is_digest(ref) else ref)
        return outlet.leaving(documents, image.media_type, image.name, tag)

    def _hold(self, blob: Descriptor, workspace: Workspace, what: str) -> None:
        if not self._store.hold(blob.digest, workspace.owner):
            raise ImageError(f"{what}: the blob {blob.digest} is not there")
        if (found := self._store.path(blob.digest).stat().st_size) != blob.size:
            raise ImageError(f"{what}: the blob {blob.digest} has {found} bytes, not {blob.size} as its manifest says")

    def _needed(self, more: Iterable[str] = (), without: Container[str] = ()) -> set[str]:
        pinned = (digest for digest, _ in self._store.pins())
        return {*more, host.digest(), *pinned, *(ref.digest for ref in self._store.refs(PREFIX) if ref.name not in without)}

    def _converted(self, digest: str) -> Documents:
        """Make an OCI image of what an older Trivisor made, and let its names mean that."""
        refs = self._store.refs(PREFIX)
        there = [ref.digest for ref in refs if ref.value.get(older.FROM) == digest]
        named = [ref for ref in refs if ref.digest == digest]
        with self.workspace() as work:
            if not there:
                squashfs = self._store.path(digest)
                run = older.config(named[0].value["config"] if named else {}).run
                manifest, media_type = older.convert(self._store, digest, run, work)
                there = [self.add(manifest, media_type, "", "an older Trivisor", work).digest]
                self._derived.inherit(squashfs, there[0])
            for ref in named:
                value = {
                    "created": ref.value["created"],
                    "source": ref.value["source"],
                    "media_type": model.OCI_MANIFEST,
                    older.FROM: digest,
                }
                self._name(Ref(ref.name, there[0], value))
            documents = self._library.read(there[0])
        assert documents is not None
        return documents

    def _name(self, ref: Ref) -> Image:
        """Let the name mean the digest from now on, and remove what it meant before if nobody needs that."""
        before = [found.digest for found in self._store.refs(ref.name) if found.name == ref.name]
        self._store.set_ref(ref.name, ref.digest, ref.value)
        for digest in before:
            if digest != ref.digest:
                self._clean(digest)
        return self._image(ref)

    def _clean(self, digest: str) -> None:
        """Remove what the image with this digest left nobody to need."""
        derived: set[str] = set()
        with suppress(StorageError):  # of a damaged one the sweep finds what is left
            derived = self._derived.names([digest])
        self._store.collect()
        if derived and not self._store.exists(digest):
            with suppress(StorageError):
                self._derived.drop(derived - self._derived.names(self._needed()))

    def _find(self, ref: str) -> Image:
        refs = self._store.refs(PREFIX)
        if model.is_digest(ref):
            named = [found for found in refs if found.digest == ref]
            if not named and not self._store.exists(ref):
                raise NotFound(f"there is no image {ref}", hint="`trivisor images` lists those that have a name")
            return self._image(named[0] if named else Ref(PREFIX + ref, ref, {"created": 0.0, "source": ""}))
        name = normalise(ref)
        short = [found for found in refs if _DIGITS.fullmatch(ref) and found.digest.startswith(f"sha256:{ref}")]
        for found in (*(found for found in refs if found.name == PREFIX + name), *short):
            if found.name == PREFIX + name or len({one.digest for one in short}) == 1:
                return self._image(found)
        have = f"there are {', '.join(found.name.removeprefix(PREFIX) for found in refs[:20])}; " if refs else ""
        raise NotFound(
            f"there is no image {name}", hint=have + "get one with `trivisor pull`, `trivisor import` or `trivisor images bootstrap`"
        )

    def _image(self, ref: Ref) -> Image:
        known: dict[str, Any] = {key: ref.value[key] for key in ("created", "source")}
        name = ref.name.removeprefix(PREFIX)
        try:
            documents = self._library.read(ref.digest)
            rootfs = self._derived.rootfs_path(ref.digest)
        except (NotFound, StorageError):
            # It is listed, and removed, like any other; `get` says what it lacks.
            return Image(name, ref.digest, self._store.locate(ref.digest), ref.value.get("size", 0), **known)
        if documents is None:
            return Image(name, ref.digest, rootfs, ref.value.get("size", 0), config=older.config(ref.value.get("config", {})), **known)
        layers = tuple(documents.manifest.layers)
        kind = ref.value.get("media_type", model.OCI_MANIFEST)
        return Image(name, ref.digest, rootfs, documents.size, config=documents.config, layers=layers, media_type=kind, **known)


def _free(name: str) -> str:
    """Return the name that an image is kept under. Raises InvalidSpec for the one that is taken for good."""
    if (whole := normalise(name)) == normalise(host.NAME):
        raise InvalidSpec('the image "host" is the host\'s own root', hint="choose another name")
    return whole
