"""What the catalog says of roots: which an image has, where they are, and that they be made (derived.py)."""

from __future__ import annotations

from pathlib import Path

from trivisor.images.derived import Derived, Progress
from trivisor.images.image import PREFIX
from trivisor.store.store import Store


class Rooted:
    """The part of `Images` that is about roots."""

    _derived: Derived
    _store: Store

    def key(self, digest: str) -> str:
        """Return what names its root: the same for images that have the same layers. Raises NotFound."""
        return self._derived.key(digest)

    def rootfs(self, digest: str, progress: Progress = lambda _: None) -> Path:
        """Return the root as squashfs; made when first asked for, in some seconds. Of the host's own root the host's.

        It stays for as long as the image. Raises NotFound, ImageError, HostLacks, EngineError, StorageError.
        """
        return self._derived.rootfs(digest, progress)

    def passing_rootfs(self, digest: str, progress: Progress = lambda _: None) -> Path:
        """Return a root that is sooner there: that of the layers below, and what the others change behind it (stacked.py).

        Its bytes depend on what there is, so it is for machines that are not kept. Raises what `rootfs` raises.
        """
        return self._derived.passing(digest, progress)

    def root_path(self, digest: str, *, passing: bool = False) -> tuple[Path, str]:
        """Return where `rootfs`, or `passing_rootfs`, puts it, and what names it, without making it. Raises NotFound."""
        return self._derived.passing_path(digest) if passing else (self.rootfs_path(digest), self.key(digest))

    def rootfs_path(self, digest: str) -> Path:
        """Return where `rootfs` puts it, without making it. Raises NotFound."""
        return self._derived.rootfs_path(digest)

    def lowers(self, digest: str, progress: Progress = lambda _: None) -> tuple[Path, ...]:
        """Return the unpacked root: folders to lay over one another, the uppermost first, read-only and shared.

        Made when first asked for. They stay for as long as an image has them, and for a host's root the machines that have it.
        Raises NotFound, ImageError, HostLacks, EngineError, StorageError.
        """
        return self._derived.lowers(digest, progress)

    def unpacked(self, digest: str) -> tuple[Path, ...]:
        """Return what `lowers` does, to be looked into and not run: also of an image for another platform."""
        return self._derived.lowers(digest, lambda _: None, foreign=True)

    def lower_paths(self, digest: str) -> tuple[Path, ...]:
        """Return where `lowers` puts them, without making them. Raises NotFound."""
        return self._derived.lower_paths(digest)

    def tree_lacks(self, digest: str) -> str:
        """Say what the unpacked root lacks of the image, "" if nothing."""
        return self._derived.lost(digest)

    def forget_rootfs(self, digest: str, owner: str) -> None:
        """Remove the squashfs that were made of an image, unless one with a name, or somebody else than `owner`, needs them."""
        others = {found for found, holder in self._store.pins() if holder != owner}
        others |= {ref.digest for ref in self._store.refs(PREFIX)}
        self._derived.forget(digest, others)
