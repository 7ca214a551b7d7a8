"""What a build is asked for, beside its Containerfile."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trivisor.core.errors import InvalidSpec
from trivisor.images.model import Platform
from trivisor.images.registry.access import Access
from trivisor.va.build.events import BuildEvent, Report


def _silent(_: BuildEvent) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Options:
    """The wishes of one build. `memory` and `cpus` are of each step's machine."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    """Values of ARGs (--build-arg)."""
    target: str = ""
    """The stage to build; "" the last."""
    wall: str = "container"
    network: str = "nat"
    """Of the machines of RUN steps: "nat", "none", a named network, or "host", its own (container)."""
    memory: int | str = "1G"
    cpus: float = 1
    secrets: Mapping[str, Path | str | bytes] = field(default_factory=dict)
    """By id: a file, or the secret itself as bytes."""
    labels: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    use_cache: bool = True
    pull: bool = False
    """Ask registries for bases even if they are here."""
    timeout: float | None = None
    """Seconds for each RUN."""
    epoch: int | None = None
    """Seconds since 1970: nothing in the image is newer, and it was created then. None: `$SOURCE_DATE_EPOCH`, or the times that are."""
    access: Access = field(default_factory=Access)
    """How registries are reached."""
    report: Report = _silent

    @property
    def latest(self) -> int | None:
        """Return how new a file may be. Raises InvalidSpec."""
        text = os.environ.get("SOURCE_DATE_EPOCH", "")
        if self.epoch is not None or not text:
            return self.epoch
        if not text.isdecimal() or len(text) > 12:
            raise InvalidSpec(f"SOURCE_DATE_EPOCH={text[:20]!r} is no time", hint="give seconds since 1970")
        return int(text)

    def secret(self, name: str) -> bytes | None:
        """Return the secret with this id, None if there is none. Raises InvalidSpec."""
        found = self.secrets.get(name)
        if found is None or isinstance(found, bytes):
            return found
        try:
            return Path(found).read_bytes()
        except OSError as error:
            raise InvalidSpec(f"the secret {name} cannot be read: {found}: {error.strerror}") from error
