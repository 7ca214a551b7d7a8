"""Images of a home made before images were OCI images: a name that means a squashfs, the root itself.

They go on working as they are, and so do machines made of them. Where a manifest is asked for (to save, push, build on or commit to
one) such an image becomes an OCI image of one layer, and its names mean that from then on; the squashfs it had is that image's root.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trivisor.core import process
from trivisor.core.errors import ImageError
from trivisor.images.intake import Intake
from trivisor.images.limits import DEFAULT
from trivisor.images.model import ImageConfig, Platform, RootFs, RunConfig
from trivisor.store.store import Store
from trivisor.store.workspace import Workspace

UNPACK_TIMEOUT = 1800.0
FROM = "converted_from"
"""In the value of a name: the digest of the squashfs that it meant."""


def config(kept: dict[str, Any]) -> ImageConfig:
    """Return the config that an older Trivisor kept with a name, as an image's."""
    env = [f"{key}={value}" for key, value in kept.get("env", {}).items()] or None
    run = RunConfig(env, kept.get("entrypoint"), kept.get("cmd"), kept.get("user"), kept.get("workdir"))
    here = Platform.host()
    return ImageConfig(here.architecture, here.os, RootFs("layers", []), run)


def unsquash(squashfs: Path, target: Path) -> None:
    """Unpack a squashfs to the new folder `target`. Without root all belongs to the caller. Raises HostLacks, EngineError."""
    argv = [process.find("unsquashfs", "squashfs-tools"), "-no-progress", "-quiet", "-dest", str(target)]
    if os.geteuid() != 0:
        argv.append("-user-xattrs")  # the others are root's to give, and refused they make it fail
    process.run([*argv, squashfs], timeout=UNPACK_TIMEOUT)


def convert(store: Store, digest: str, wish: RunConfig, work: Workspace) -> tuple[bytes, str]:
    """Make the blobs of an OCI image of the squashfs `digest`; return its manifest and media type. Takes some seconds.

    Raises ImageError without root, HostLacks, EngineError, StorageError.
    """
    if os.geteuid() != 0:
        hint = "get or import the image again: without root its owners cannot be read from what is there"
        raise ImageError(f"{digest} is no OCI image: an older Trivisor made it", hint=hint)
    unsquash(store.path(digest), work.path / "older")
    with Intake(store, work, DEFAULT, lambda _: None) as intake:
        return intake.folder(work.path / "older", Platform.host(), "an older Trivisor", wish)
