"""How a registry is reached: what pull and push take alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from trivisor.images.registry.bounds import Bounds
    from trivisor.images.registry.credentials import Credentials
    from trivisor.images.registry.crew import Report


class Access(TypedDict, total=False):
    """Keyword arguments of `pull` and `push`."""

    credentials: Credentials | None
    """None: what the Docker config has for the registry."""
    insecure: bool
    """The registry may speak plain HTTP, or have any certificate; one on a loopback address always may."""
    report: Report
    """Hears how far each blob is, in the caller's thread; what it raises ends the work."""
    bounds: Bounds
