"""What stands for a VMM in verbs that are mostly about images: those are opened at once, all else when it is first needed.

Loading what runs machines takes several times as long as listing images, or as a build that finds all its steps in the cache.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from trivisor.cli.options import Settings, settings
from trivisor.core.paths import Home, default_home

if TYPE_CHECKING:
    from trivisor.images.catalog import Images
    from trivisor.vmm.keywords import RunKeywords
    from trivisor.vmm.machine import Machine
    from trivisor.vmm.manager import VMM


class Late:
    """The home of the command line (a `Maker` for builds)."""

    def __init__(self, chosen: Settings) -> None:
        self._settings = chosen

    @property
    def home(self) -> Path:
        return self._settings.home or default_home()

    @cached_property
    def images(self) -> Images:
        """Raises StorageError if the home cannot be used."""
        from trivisor.vmm import shelf
        from trivisor.vmm.records import Records

        place = Home(self.home)
        place.open()
        return shelf.images(place, Records(place.database))

    @cached_property
    def _vmm(self) -> VMM:
        return self._settings.vmm()

    def run(self, image: str, **spec: Unpack[RunKeywords]) -> Machine:
        return self._vmm.run(image, **spec)


def opened() -> Late:
    """Return the home that the command line names."""
    return Late(settings())
