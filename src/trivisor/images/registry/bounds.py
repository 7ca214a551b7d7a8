"""What a registry may ask of us. Each bound holds against one that is slow, large or hostile."""

from __future__ import annotations

from dataclasses import dataclass

from trivisor.core.units import GIB, KIB, MIB


@dataclass(frozen=True)
class Bounds:
    """The bounds of one pull or push. Sizes are bytes, times seconds."""

    connect: float = 10.0
    """To a connection, TLS included."""
    silence: float = 30.0
    """Without a byte, and from a request to the end of its answer's headers."""
    settle: float = 300.0
    """From the last byte of an upload to its answer."""
    document: float = 60.0
    """From the headers of a document (manifest, token, error) to its end."""
    slowest: int = 1 * KIB
    """Bytes a second that a blob must bring, over `silence` seconds."""
    transfer: float = 6 * 3600.0
    """Of one blob, waiting and retries included."""
    tries: int = 5
    """Of one request, or of a blob without anything gained."""
    backoff: float = 0.5
    """Before the second try; doubled before each further one."""
    patience: float = 60.0
    """The longest Retry-After that is waited for."""
    redirects: int = 5
    manifest: int = 4 * MIB
    config: int = 8 * MIB
    layers: int = 500
    layer: int = 20 * GIB
    total: int = 40 * GIB
    parallel: int = 4
    """Blobs under way at once."""
    chunk: int = 64 * MIB
    """Of an upload; smaller blobs go up in one request."""


DEFAULT = Bounds()
ERROR = 64 * KIB
"""Of an answer that says what is wrong."""
TOKEN = 1 * MIB
"""Of an answer with a token."""
