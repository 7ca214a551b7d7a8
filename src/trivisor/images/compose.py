"""New images out of layers: the config and the manifest that name them (OCI image-spec, config.md and manifest.md).

What is written is OCI, whatever the base came as, and the same for the same parts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from trivisor.images import model
from trivisor.images.catalog import Image, Images
from trivisor.images.documents import Documents
from trivisor.images.intake import Bytes
from trivisor.images.model import Descriptor, History, ImageConfig, Manifest, Platform, RootFs, RunConfig
from trivisor.store.workspace import Workspace


@dataclass(frozen=True)
class Stacked:
    """One layer, and how it came about."""

    descriptor: Descriptor
    diff_id: str


def stack_of(documents: Documents) -> list[Stacked]:
    """Return the layers of an image, the lowest first, as an OCI manifest names them."""
    found = zip(model.as_oci(documents.manifest).layers, documents.config.rootfs.diff_ids, strict=True)
    return [Stacked(Descriptor(layer.media_type, layer.digest, layer.size), diff_id) for layer, diff_id in found]


def stamp(seconds: float) -> str:
    """Return a time as configs have it (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def add(
    images: Images,
    work: Workspace,
    layers: Sequence[Stacked],
    run: RunConfig,
    history: Sequence[History],
    *,
    name: str = "",
    source: str,
    created: float,
    author: str = "",
    platform: Platform | None = None,
) -> Image:
    """Register the image of `layers`, whose blobs are in the store under `work`; "" as `name` gives it none.

    Raises what `Images.add` raises.
    """
    here = platform or Platform.host()
    config = ImageConfig(
        here.architecture,
        here.os,
        RootFs("layers", [layer.diff_id for layer in layers]),
        run,
        list(history) or None,
        stamp(created),
        author,
        here.variant,
    )
    data = model.encode(config)
    digest = images.store.add(Bytes(data), work.owner)
    manifest = Manifest(Descriptor(model.OCI_CONFIG, digest, len(data)), [layer.descriptor for layer in layers], 2, model.OCI_MANIFEST)
    return images.add(model.encode(manifest), model.OCI_MANIFEST, name, source, work)
