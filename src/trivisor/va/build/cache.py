"""Steps that were done before: a ref of the store ("build:KEY") for the layer that each made.

A key is a digest of all that a step depends on: the layers below, what it does, and the content of the files that it takes. So a step is
found again wherever it stands, and a changed one is not. Layers of steps stay until they are pruned.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from trivisor.core.errors import NotFound
from trivisor.images.compose import Stacked
from trivisor.images.model import Descriptor
from trivisor.images.pack import PackedLayer
from trivisor.store.store import Store
from trivisor.store.workspace import Workspace

PREFIX = "build:"
_VERSION = 1
"""Raised when the same step makes another layer than before."""


@dataclass(frozen=True)
class Made:
    """A layer that a step made, and when (seconds since the epoch)."""

    layer: Stacked
    created: float


class Cache:
    """The steps of one home."""

    def __init__(self, store: Store, *, use: bool = True) -> None:
        """Without `use` nothing is found; what is made is kept all the same."""
        self._store = store
        self._use = use

    def find(self, key: str, work: Workspace) -> Made | None:
        """Return what the step made, held by `work`; None if it must be done."""
        if not self._use:
            return None
        for ref in self._store.refs(PREFIX + key):
            if self._store.hold(ref.digest, work.owner):
                value = ref.value
                return Made(Stacked(Descriptor(value["media_type"], ref.digest, value["size"]), value["diff_id"]), value["created"])
        return None

    def keep(self, key: str, packed: PackedLayer, work: Workspace, created: float, chain: str) -> Made:
        """Put the layer into the store and remember it; `chain` names the root with it on top. Raises StorageError."""
        digest = self._store.adopt(packed.path, work.owner, expected=packed.digest)
        value: dict[str, Any] = {"size": packed.size, "diff_id": packed.diff_id, "media_type": packed.media_type, "created": created}
        value["chain"] = chain
        self._store.set_ref(PREFIX + key, digest, value)
        return Made(Stacked(packed.descriptor, packed.diff_id), created)


def key(*parts: object) -> str:
    """Return the digest of what a step depends on: plain values."""
    return hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def prune(store: Store, *, older: float = 0.0) -> int:
    """Forget the steps that were made over `older` seconds ago, and return the bytes that this freed."""
    limit = time.time() - older
    for ref in store.refs(PREFIX):
        if ref.value["created"] <= limit:
            try:
                store.drop_ref(ref.name)
            except NotFound:
                continue  # another prunes as well
    return store.collect()
