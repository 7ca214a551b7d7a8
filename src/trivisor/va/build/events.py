"""What a build tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["begin", "cached", "output", "done"]


@dataclass(frozen=True)
class BuildEvent:
    """One step of a stage begins, was found in the cache, says something, or is done."""

    kind: Kind
    stage: str
    """Its name, or its number."""
    step: int
    """From 1."""
    steps: int
    text: str
    """The instruction, as it is written."""
    line: int
    data: bytes = b""
    """What the step's command said: of `output`."""
    seconds: float = 0.0
    """That the step took: of `done`."""


Report = Callable[[BuildEvent], None]
"""Called in the thread of the stage; what it raises ends the build."""
