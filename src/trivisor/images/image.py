"""What the catalog says of an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trivisor.images.model import Descriptor, History, ImageConfig, Platform, RootFs

PREFIX = "image:"
"""Begins the names of images among the refs of the store."""
_NO_CONFIG = ImageConfig("", "", RootFs("layers", []))


@dataclass(frozen=True)
class Image:
    """One image. `digest` is its manifest's, `size` the bytes of its layers as they are stored, `created` when it came here (seconds
    since the epoch), `layers` the lowest first, `rootfs` where the squashfs of its root is or will be.

    Images of a home made before images were OCI images have no layers; `digest` and `size` are of their squashfs.
    """

    name: str
    digest: str
    rootfs: Path
    size: int
    created: float
    source: str
    config: ImageConfig = _NO_CONFIG
    layers: tuple[Descriptor, ...] = ()
    media_type: str = ""

    @property
    def platform(self) -> Platform:
        return self.config.platform

    @property
    def history(self) -> list[History]:
        """How it came about, the oldest step first."""
        return self.config.history or []
