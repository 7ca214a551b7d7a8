"""What an image is: the documents of the OCI image-spec (v1.1) and of Docker's schema 2, which says the same in other words.

A manifest names a config and layers by digest; an index names manifests, one for each platform. They are read into these
structs, which know what Trivisor uses; where a document is kept or sent on, its own bytes are, so that its digest stays.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from trivisor.core.errors import ImageError, InvalidSpec
from trivisor.images.limits import DEFAULT, Limits

T = TypeVar("T")

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = DOCKER_LAYER + ".gzip"

OCI_OF = {DOCKER_LAYER: OCI_LAYER, DOCKER_LAYER_GZIP: OCI_LAYER_GZIP, DOCKER_LAYER + ".zstd": OCI_LAYER_ZSTD}
"""What OCI calls a layer that Docker calls otherwise; the bytes are the same."""

INDEXES = (OCI_INDEX, DOCKER_INDEX)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
ACCEPTED = (*MANIFESTS, *INDEXES)
"""What to ask a registry for."""
LAYERS = (OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER + ".zstd")
MAX_LAYERS = 127
"""As Docker bounds it."""
REF_NAME = "org.opencontainers.image.ref.name"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64", "armv7l": "arm", "i686": "386"}


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an image runs on."""

    architecture: str
    os: str = "linux"
    variant: str = ""
    os_version: str = msgspec.field(name="os.version", default="")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `[os/]architecture[/variant]`. Raises InvalidSpec."""
        parts = text.split("/")
        if len(parts) == 1:
            parts = ["linux", *parts]
        if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", part) for part in parts):
            raise InvalidSpec(f"{text[:80]!r} is not a platform", hint="for example linux/amd64")
        return cls(_MACHINES.get(parts[1], parts[1]), parts[0], *parts[2:])

    @classmethod
    def host(cls) -> Platform:
        """Return that of this host."""
        machine = os.uname().machine
        return cls(_MACHINES.get(machine, machine))

    def runs(self, other: Platform) -> bool:
        """Tell whether what is for `other` is for this one."""
        return (self.os, self.architecture) == (other.os, other.architecture) and (not self.variant or self.variant == other.variant)

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(msgspec.Struct, rename="camel", omit_defaults=True):
    """Names a blob by digest and size."""

    media_type: str
    digest: str
    size: int
    urls: list[str] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str = ""


class Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    """One image: its config, and its layers, the lowest first."""

    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = 0
    media_type: str = ""
    annotations: dict[str, str] | None = None


def as_oci(manifest: Manifest) -> Manifest:
    """Return an OCI manifest of the same blobs: Docker's config is an OCI one by another name."""
    layers = [msgspec.structs.replace(layer, media_type=OCI_OF.get(layer.media_type, layer.media_type)) for layer in manifest.layers]
    config = msgspec.structs.replace(manifest.config, media_type=OCI_CONFIG)
    return msgspec.structs.replace(manifest, config=config, layers=layers, schema_version=2, media_type=OCI_MANIFEST)


class Index(msgspec.Struct, rename="camel", omit_defaults=True):
    """Images of several platforms, or those of a layout."""

    manifests: list[Descriptor]
    schema_version: int = 0
    media_type: str = ""
    annotations: dict[str, str] | None = None


class Healthcheck(msgspec.Struct, rename="pascal", omit_defaults=True):
    """How to find out whether the application is well. Times are nanoseconds; `test` begins with NONE, CMD or CMD-SHELL."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class RunConfig(msgspec.Struct, rename="pascal", omit_defaults=True):
    """How the image wants to be run (config.md, "config")."""

    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    volumes: dict[str, Any] | None = None
    exposed_ports: dict[str, Any] | None = None
    stop_signal: str | None = None
    healthcheck: Healthcheck | None = None
    labels: dict[str, str] | None = None
    shell: list[str] | None = None
    on_build: list[str] | None = None


class RootFs(msgspec.Struct, omit_defaults=True):
    """`diff_ids` are the digests of the layers as plain tars, the lowest first."""

    type: str
    diff_ids: list[str]


class History(msgspec.Struct, omit_defaults=True):
    """How one layer came about, or with `empty_layer` a change of the config."""

    created: str | None = None
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageConfig(msgspec.Struct, omit_defaults=True):
    """The config blob. The properties are what a machine needs of it."""

    architecture: str
    os: str
    rootfs: RootFs
    config: RunConfig | None = None
    history: list[History] | None = None
    created: str | None = None
    author: str = ""
    variant: str = ""
    os_version: str = msgspec.field(name="os.version", default="")

    @property
    def run(self) -> RunConfig:
        """How it wants to be run; never None."""
        return self.config or RunConfig()

    @property
    def platform(self) -> Platform:
        return Platform(self.architecture, self.os, self.variant, self.os_version)

    @property
    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.run.env or () if "=" in pair[1:] and "\0" not in pair)

    @property
    def entrypoint(self) -> list[str]:
        return self.run.entrypoint or []

    @property
    def cmd(self) -> list[str]:
        return self.run.cmd or []

    @property
    def user(self) -> str:
        return self.run.user or ""

    @property
    def workdir(self) -> str:
        return self.run.working_dir or ""

    @property
    def labels(self) -> dict[str, str]:
        return self.run.labels or {}


def is_digest(text: str) -> bool:
    """Tell whether `text` names a blob."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes) -> str:
    """Return the digest of a document."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def encode(document: msgspec.Struct) -> bytes:
    """Return the document's JSON, the same for the same document."""
    return msgspec.json.encode(document)


def decode(data: bytes, kind: type[T], what: str, limits: Limits = DEFAULT) -> T:
    """Read a document; `what` begins the message. Raises ImageError."""
    if len(data) > limits.document:
        raise ImageError(f"{what}: a document of {len(data)} bytes is over the limit of {limits.document}")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ImageError(f"{what}: is malformed: {error}") from error


def read_manifest(data: bytes, media_type: str, what: str, limits: Limits = DEFAULT) -> Manifest:
    """Read an image's manifest, and see to it that all it names can be had. Raises ImageError.

    `media_type` is what it came as, empty if that was not said: then what it says of itself holds.
    """
    if media_type.startswith("application/vnd.docker.distribution.manifest.v1+"):
        raise ImageError(f"{what}: is a manifest of Docker's schema 1, given up in 2017", hint="push the image anew with a current Docker")
    manifest = decode(data, Manifest, what, limits)
    kind = media_type or manifest.media_type
    if kind and kind not in MANIFESTS:
        raise ImageError(f"{what}: {kind[:100]!r} is not the manifest of an image")
    for descriptor in (manifest.config, *manifest.layers):
        check_descriptor(descriptor, what)
    if manifest.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG, ""):
        raise ImageError(f"{what}: it holds {manifest.config.media_type[:100]!r} and is not an image")
    if manifest.config.size > limits.document:
        raise ImageError(f"{what}: its config of {manifest.config.size} bytes is over the limit of {limits.document}")
    if len(manifest.layers) > MAX_LAYERS:
        raise ImageError(f"{what}: it has over {MAX_LAYERS} layers")
    for layer in manifest.layers:
        if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
            hint = "such layers (Windows) lie with their vendor; use an image without them"
            raise ImageError(f"{what}: {layer.digest} is a foreign layer, which is not distributed with the image", hint=hint)
        if layer.media_type not in LAYERS:
            raise ImageError(f"{what}: {layer.digest} is of type {layer.media_type[:100]!r}, not a layer that can be unpacked")
    return manifest


def read_config(data: bytes, manifest: Manifest, what: str, limits: Limits = DEFAULT) -> ImageConfig:
    """Read the config that goes with `manifest`. Raises ImageError."""
    config = decode(data, ImageConfig, what, limits)
    diffs = config.rootfs.diff_ids
    if config.rootfs.type != "layers" or not all(_DIGEST.fullmatch(diff) for diff in diffs):
        raise ImageError(f"{what}: its config has no diff_ids")
    if len(diffs) != len(manifest.layers):
        raise ImageError(f"{what}: its config is of {len(diffs)} layers, its manifest of {len(manifest.layers)}")
    return config


def check_descriptor(descriptor: Descriptor, what: str) -> None:
    """Raise ImageError for one that does not name a blob."""
    if not _DIGEST.fullmatch(descriptor.digest):
        raise ImageError(f"{what}: {descriptor.digest[:80]!r} is not a digest", hint="digests are sha256: and 64 hexadecimal digits")
    if not 0 <= descriptor.size < 1 << 50:
        raise ImageError(f"{what}: {descriptor.digest} has {descriptor.size} bytes")


def choose(manifests: Sequence[Descriptor], platform: Platform, what: str) -> Descriptor:
    """Return the image of an index that is for `platform`. One that names no platform is for any. Raises ImageError."""
    images = [one for one in manifests if not one.artifact_type and (one.annotations or {}).get("vnd.docker.reference.type") is None]
    found = [one for one in images if one.platform is not None and platform.runs(one.platform)]
    found = found or [one for one in images if one.platform is None]
    if not found:
        there = ", ".join(sorted({str(one.platform) for one in images})) or "none"
        raise ImageError(f"{what}: there is no image for {platform}", hint=f"there are images for: {there}")
    check_descriptor(found[0], what)
    return found[0]


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Return the name of each layer with all below it, the lowest first (config.md, "Layer ChainID")."""
    chain: list[str] = []
    for diff in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff}".encode()) if chain else diff)
    return chain
