"""What an image may ask of the host while it is read. Each bound holds against an archive made to hurt."""

from __future__ import annotations

from dataclasses import dataclass

from trivisor.core.units import GIB, KIB, MIB


@dataclass(frozen=True)
class Limits:
    """The bounds of one import. Sizes are bytes."""

    total: int = 20 * GIB
    """Of all files unpacked, holes included, also of those that a later entry replaces."""
    entries: int = 2_000_000
    metadata: int = 512 * MIB
    """Of all names, link targets and extended attributes: they are held in memory."""
    header: int = 1 * MIB
    """Of one extension header (pax, GNU long name), and of one sparse map."""
    document: int = 4 * MIB
    """Of one JSON document (manifest, config)."""
    ratio: int = 1000
    """Unpacked to packed, once over 64 MiB are unpacked. Real layers stay under 100; gzip cannot pass 1032."""
    depth: int = 1024
    """Of folders in folders."""


DEFAULT = Limits()
MAX_PATH = 4096
MAX_NAME = 255
MAX_TARGET = 4095
MAX_XATTR = 64 * KIB
