"""The images of a home: names, and what they mean.

A name is a ref of the store ("image:debian:latest") whose blob is the root as squashfs. Nothing here locks:
each import works in a workspace of its own and the name is set in one transaction, so of two imports of the
same name at once the later one is meant from then on, and both are whole. A machine pins the digest it was
created from, and keeps it when the name moves on.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivisor.core.errors import InvalidSpec, NotFound, StorageError
from trivisor.core.paths import Home
from trivisor.images import bootstrap, host
from trivisor.images.build import Progress, build
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.reference import normalise
from trivisor.images.trees import Trees
from trivisor.store.store import Ref, Store

_PREFIX = "image:"


@dataclass(frozen=True)
class Image:
    """One image. `size` is of `rootfs` (squashfs), in bytes; `created` is seconds since the epoch.

    `config` may have env (dict), entrypoint, cmd (lists), user, workdir: how the image wants to be run.
    """

    name: str
    digest: str
    rootfs: Path
    size: int
    created: float
    source: str
    config: dict[str, Any] = field(default_factory=dict)


class Images:
    """The catalog of one home. Safe to use from threads, forks and many processes at once."""

    def __init__(self, home: Home, *, noted: Callable[[Image], object] = lambda _: None) -> None:
        """`noted` is told of each image that is made."""
        self._store = Store(home.store)
        self._trees = Trees(home)
        self._noted = noted

    def get(self, ref: str) -> Image:
        """Return the image called `ref` (name[:tag]); "host" is the host's own root (host.py).

        Raises NotFound, InvalidSpec, StorageError if it is damaged.
        """
        if ref == host.NAME:
            return Image(host.NAME, host.digest(), Path("/"), 0, 0.0, "this host")
        image = self._find(ref)
        while not _whole(image):
            # The name may have moved on, and the old root with it, since it was looked up.
            found = self._find(ref)
            if found == image:
                raise StorageError(f"the root of image {image.name} is damaged ({image.rootfs})", hint="import the image again")
            image = found
        return image

    def list(self) -> list[Image]:
        """Return every image, by name."""
        return [self._image(ref) for ref in self._store.refs(_PREFIX)]

    def rootfs(self, digest: str) -> Path:
        """Return the squashfs with this digest, whatever it is called now; of the host's own root the host's. Raises NotFound."""
        return Path("/") if digest.startswith(host.PREFIX) else self._store.path(digest)

    def tree(self, digest: str, progress: Progress = lambda _: None) -> Path:
        """Return the unpacked root of an image, read-only and shared; made when first asked for, in a second or so.

        It stays for as long as the image, and for a host's root the machines that have it. Raises NotFound, HostLacks,
        EngineError, StorageError.
        """
        return self._trees.get(digest, lambda: self._store.path(digest), progress)

    def tree_path(self, digest: str) -> Path:
        """Return where `tree` puts it, without making it."""
        return self._trees.path(digest)

    def tree_lacks(self, digest: str) -> str:
        """Say what the unpacked root lacks of the image, "" if nothing."""
        return self._trees.lost(digest)

    def sweep(self, needed: Callable[[], Iterable[str]]) -> builtins.list[str]:
        """Remove unpacked roots of images that are gone, and of the host as it was but for those `needed`; say what."""

        def all_needed() -> set[str]:
            pinned = (digest for digest, _ in self._store.pins())
            return {*needed(), host.digest(), *pinned, *(ref.digest for ref in self._store.refs(_PREFIX))}

        return self._trees.keep(all_needed)

    def import_(self, source: Path, name: str, *, progress: Progress = lambda _: None, limits: Limits = DEFAULT) -> Image:
        """Make an image of a folder, a tar (plain, gzip, zstd, bzip2, xz), a `docker save` archive or an OCI layout.

        Raises ImageError for what cannot be read or is not safe, StorageError, HostLacks, InvalidSpec.
        """
        return self._import(Path(source), _free(name), str(source), progress, limits)

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
        with self._store.workspace() as work:
            archive = work.path / "bootstrap.tar"
            bootstrap.debian(archive, suite, packages, limits, progress)
            source = f"mmdebstrap {suite} {' '.join(packages)}".strip()
            return self._import(archive, name, source, progress, limits)

    def remove(self, ref: str) -> None:
        """Forget the name, and the image with its last name. Raises NotFound, CallerError if a machine needs it."""
        image = self._find(ref)
        self._store.drop_ref(_PREFIX + image.name)
        self._store.collect()
        if not self._store.exists(image.digest):
            self._trees.drop(image.digest)

    def pin(self, image: Image, owner: str, *, durable: bool = True) -> None:
        """Keep the image's root until `owner` unpins it; without `durable` until a power cut at most. Raises NotFound if it is gone."""
        if not image.digest.startswith(host.PREFIX):
            self._store.pin(image.digest, owner, durable=durable)

    def unpin(self, owner: str) -> None:
        """Drop the owner's pins. Roots that nobody needs any more go at the next collection."""
        self._store.unpin(owner)

    def close(self) -> None:
        """Let go of the store; it is opened again when needed."""
        self._store.close()

    def collect(self) -> int:
        """Remove roots that nobody needs, and what crashes left. Return the bytes freed."""
        return self._store.collect()

    def _import(self, source: Path, name: str, origin: str, progress: Progress, limits: Limits) -> Image:
        with self._store.workspace() as work:
            made, config = build(source, name, work.path, limits, progress)
            size = made.stat().st_size
            digest = self._store.adopt(made, work.owner)
            value = {"size": size, "created": time.time(), "source": origin, "config": config}
            before = [ref.digest for ref in self._store.refs(_PREFIX + name) if ref.name == _PREFIX + name]
            self._store.set_ref(_PREFIX + name, digest, value)
        if before and before != [digest]:
            self._store.collect()
        image = self._image(Ref(_PREFIX + name, digest, value))
        self._noted(image)
        return image

    def _find(self, ref: str) -> Image:
        name = normalise(ref)
        images = self.list()
        for image in images:
            if image.name == name:
                return image
        have = f"there are {', '.join(image.name for image in images[:20])}; " if images else ""
        raise NotFound(f"there is no image {name}", hint=have + "get one with `trivisor images bootstrap` or `trivisor images import`")

    def _image(self, ref: Ref) -> Image:
        return Image(name=ref.name.removeprefix(_PREFIX), digest=ref.digest, rootfs=self._store.locate(ref.digest), **ref.value)


def _free(name: str) -> str:
    """Return the name that an image is kept under. Raises InvalidSpec for the one that is taken for good."""
    if (whole := normalise(name)) == normalise(host.NAME):
        raise InvalidSpec('the image "host" is the host\'s own root', hint="choose another name")
    return whole


def _whole(image: Image) -> bool:
    try:
        return image.rootfs.stat().st_size == image.size
    except FileNotFoundError:
        return False
