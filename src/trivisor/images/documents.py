"""The manifests and configs of the images of one store, read once: what a digest says never changes.

A home made before images were OCI images has some whose digest is of a squashfs, the root itself. They are told by their first
bytes, and have no documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from trivisor.core.errors import ImageError, StorageError
from trivisor.images.limits import DEFAULT
from trivisor.images.model import Descriptor, ImageConfig, Manifest, chain_ids, read_config, read_manifest
from trivisor.store.faults import translated
from trivisor.store.store import Store

_SQUASHFS = b"hsqs"


@dataclass(frozen=True)
class Documents:
    """What one digest stands for."""

    digest: str
    data: bytes
    """The manifest as it came."""
    manifest: Manifest
    config: ImageConfig

    @cached_property
    def chain(self) -> list[str]:
        """The name of each layer with all below it, the lowest first."""
        return chain_ids(self.config.rootfs.diff_ids)

    @property
    def size(self) -> int:
        """Bytes of its layers as they are stored."""
        return sum(layer.size for layer in self.manifest.layers)

    @property
    def blobs(self) -> list[Descriptor]:
        return [self.manifest.config, *self.manifest.layers]


class Library:
    """The documents of the images of `store`. Safe to use from threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Documents | None] = {}

    def read(self, digest: str) -> Documents | None:
        """Return the documents of the image with this digest, None if it is a squashfs. Raises NotFound, StorageError."""
        if digest not in self._known:
            data = self._bytes(digest)
            self._known[digest] = None if data[:4] == _SQUASHFS else self._parse(digest, data)
        return self._known[digest]

    def lacking(self, digest: str, size: int = 0) -> str:
        """Say which blob of the image is not there or was cut, "" if none; `size` is that of a squashfs. Raises what `read` raises."""
        documents = self.read(digest)
        blobs = [(blob.digest, blob.size) for blob in documents.blobs] if documents else []
        for blob, right in [(digest, len(documents.data) if documents else size), *blobs]:
            path = self._store.locate(blob)
            try:
                if path.stat().st_size != right:
                    return f"{path} was cut"
            except FileNotFoundError:
                return f"{path} is gone"
        return ""

    def _parse(self, digest: str, data: bytes) -> Documents:
        try:
            manifest = read_manifest(data, "", digest)
            config = read_config(self._bytes(manifest.config.digest), manifest, manifest.config.digest)
        except ImageError as error:
            # It was right when it was registered.
            raise StorageError(f"the image {digest} is damaged: {error}", hint="remove it and get it again") from error
        return Documents(digest, data, manifest, config)

    def _bytes(self, digest: str) -> bytes:
        with translated(self._store.root), self._store.path(digest).open("rb") as file:
            begin = file.read(4)
            return begin if begin == _SQUASHFS else begin + file.read(DEFAULT.document)
