"""The images of a home, with what comes and goes among the home's events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trivisor.core.paths import Home
from trivisor.images.build import Progress
from trivisor.images.catalog import Image, Images
from trivisor.images.limits import DEFAULT, Limits
from trivisor.vmm.records import Records


class NotedImages(Images):
    """Images that writes down its imports. What it raises is what Images raises."""

    def __init__(self, home: Home, records: Records) -> None:
        super().__init__(home)
        self._records = records

    def import_(self, source: Path, name: str, *, progress: Progress = lambda _: None, limits: Limits = DEFAULT) -> Image:
        return self._noted(super().import_(source, name, progress=progress, limits=limits))

    def bootstrap(
        self,
        name: str = "debian",
        suite: str = "bookworm",
        packages: Sequence[str] = ("python3-minimal",),
        *,
        progress: Progress = lambda _: None,
        limits: Limits = DEFAULT,
    ) -> Image:
        return self._noted(super().bootstrap(name, suite, packages, progress=progress, limits=limits))

    def _noted(self, image: Image) -> Image:
        self._records.note("image-imported", f"{image.name} from {image.source}")
        return image
