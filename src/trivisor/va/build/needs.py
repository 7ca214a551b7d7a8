"""What a build needs of a VMM: its images, and a machine for each RUN that is not found in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack

if TYPE_CHECKING:
    from trivisor.images.catalog import Images
    from trivisor.vmm.keywords import RunKeywords
    from trivisor.vmm.machine import Machine


class Maker(Protocol):
    """A VMM, or what stands for one until a machine is needed: opening one takes longer than a build whose steps are all cached."""

    @property
    def home(self) -> Path:
        """The folder that all is kept in."""
        ...

    @property
    def images(self) -> Images:
        """Its images."""
        ...

    def run(self, image: str, **spec: Unpack[RunKeywords]) -> Machine:
        """Start a machine that is gone at the end of its `with`."""
        ...
