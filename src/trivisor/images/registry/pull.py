"""An image from a registry into the store: its manifest, then config and layers, several at a time.

The manifest is the last to be stored, with links to the rest, so that a pull which ends early leaves blobs that nothing reaches
and pieces that the next pull goes on with, but no image. Everything is pinned by the workspace's lease until the caller names it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivisor.core.errors import ImageError
from trivisor.images import model
from trivisor.images.reference import Reference
from trivisor.images.registry import partial
from trivisor.images.registry.bounds import DEFAULT, Bounds
from trivisor.images.registry.client import Client
from trivisor.images.registry.credentials import Credentials
from trivisor.images.registry.crew import Job, Note, Report, together
from trivisor.images.registry.fetch import fetch, held
from trivisor.store.store import Store
from trivisor.store.workspace import Workspace

SOURCE = "docker://"
_DEPTH = 2
"""Indexes in an index: none is known that needs more."""


@dataclass(frozen=True)
class Pulled:
    """What was pulled: `manifest` as the registry has it, `digest` its own; `index` that of the index it was chosen from, or "".

    `source` says where it came from, as skopeo writes it: docker://registry/repository:tag.
    """

    manifest: bytes
    media_type: str
    digest: str
    source: str
    index: str = ""


def pull(
    reference: Reference,
    store: Store,
    work: Workspace,
    *,
    platform: model.Platform | None = None,
    credentials: Credentials | None = None,
    insecure: bool = False,
    report: Report = lambda _: None,
    bounds: Bounds = DEFAULT,
) -> Pulled:
    """Pull the image that `reference` names, that for `platform` (this host's) if there are several.

    `insecure`: its registry may speak plain HTTP. `report` hears of each blob, in this thread. Raises NotFound, ImageError for
    what is not an image or is damaged, RegistryError, StorageError, and what `credentials.stored` raises.
    """
    store.open()
    client = Client(reference.registry, credentials=credentials, insecure=insecure, bounds=bounds)
    try:
        pulled, manifest = _choose(client, reference, platform or model.Platform.host())
        blobs = _blobs(manifest, bounds, str(reference))
        missing = {digest: size for digest, size in blobs.items() if not held(store, digest, size, work.owner)}
        partial.tidy(store)
        partial.room(store, sum(missing.values()) - partial.kept(store, missing))
        jobs = [(digest, size, _job(client, reference.repository, digest, size, store, work)) for digest, size in blobs.items()]
        together(jobs, bounds.parallel, report, client.cancel)
    finally:
        client.close()
    store.add(io.BytesIO(pulled.manifest), work.owner, expected=pulled.digest, links=blobs)
    return pulled


def _job(client: Client, repository: str, digest: str, size: int, store: Store, work: Workspace) -> Job:
    def job(note: Note) -> None:
        fetch(client, repository, digest, size, store, work.owner, note)

    return job


def _blobs(manifest: model.Manifest, bounds: Bounds, what: str) -> Mapping[str, int]:
    """Return the size of each blob, each once: an empty layer is often there twice. The largest first, so that they end together."""
    blobs: dict[str, int] = {}
    for blob in (manifest.config, *manifest.layers):
        if blobs.setdefault(blob.digest, blob.size) != blob.size:
            raise ImageError(f"{what}: it gives {blob.digest} two sizes")
        if blob.size > bounds.layer or (blob is manifest.config and blob.size > bounds.config):
            raise ImageError(f"{what}: {blob.digest} is {blob.size} bytes: too large")
    if sum(blobs.values()) > bounds.total:
        raise ImageError(f"{what}: it is {sum(blobs.values())} bytes, over the limit of {bounds.total}")
    return dict(sorted(blobs.items(), key=lambda item: -item[1]))


def _choose(client: Client, reference: Reference, platform: model.Platform) -> tuple[Pulled, model.Manifest]:
    wanted, index = reference.digest or reference.tag, ""
    for _ in range(_DEPTH + 1):
        data, media_type, digest = _document(client, reference, wanted)
        if media_type not in model.INDEXES:
            return Pulled(data, media_type, digest, SOURCE + reference.canonical, index), model.read_manifest(
                data, media_type, str(reference)
            )
        choice = model.choose(model.decode(data, model.Index, str(reference)).manifests, platform, str(reference))
        index, wanted = index or digest, choice.digest
    raise ImageError(f"{reference}: it is an index of indexes of indexes", hint="name the digest of the image itself")


def _document(client: Client, reference: Reference, wanted: str) -> tuple[bytes, str, str]:
    """Return a manifest or index, its media type and digest; it is what it should be, whatever the registry says."""
    what = f"{reference.repository}:{wanted}" if ":" not in wanted else f"{reference.repository}@{wanted}"
    with client.request(
        "GET",
        f"{reference.repository}/manifests/{wanted}",
        scope=f"repository:{reference.repository}:pull",
        what=what,
        headers={"Accept": ", ".join(model.ACCEPTED)},
    ) as answer:
        data = answer.document(client.bounds.manifest, f"the manifest of {what}")
        said = answer.headers.get("Docker-Content-Digest", "")
        served = answer.headers.get("Content-Type", "").partition(";")[0].strip()
    digest = model.digest_of(data)
    for other in (said if said.startswith("sha256:") else "", wanted if ":" in wanted else ""):
        if other and other != digest:
            raise ImageError(
                f"{client.registry} gave {digest} for {other[:80]!r}", hint="its copy is damaged, or it is not the one you meant"
            )
    return data, _kind(data, served, what), digest


def _kind(data: bytes, served: str, what: str) -> str:
    """Return the media type. A document that can be read as image and as index is neither: two readers would see two images."""
    document = model.decode(data, dict[str, Any], what)
    own = document.get("mediaType")
    known = (*model.MANIFESTS, *model.INDEXES)
    if ("manifests" in document and "layers" in document) or (own and served in known and own != served):
        raise ImageError(f"{what}: it can be read as two things", hint="ask who runs this registry")
    return served if served in known or not isinstance(own, str) else own
