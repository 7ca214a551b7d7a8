"""Names of images: `name[:tag]`, as Docker writes them, without a registry."""

from __future__ import annotations

import re

from trivisor.core.errors import InvalidSpec

_NAME = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
MAX = 255


def normalise(reference: str) -> str:
    """Return `reference` with its tag, "latest" if it has none. Raises InvalidSpec."""
    name, colon, tag = reference.partition(":")
    if len(reference) > MAX or not _NAME.fullmatch(name) or (colon and not _TAG.fullmatch(tag)):
        raise InvalidSpec(
            f"{reference[:80]!r} is not the name of an image",
            hint="use name or name:tag, the name in a-z, 0-9 and single . _ - / between them",
        )
    return f"{name}:{tag or 'latest'}"
