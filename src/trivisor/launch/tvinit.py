"""The compiled tvinit that this installation carries."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from trivisor.core.errors import HostLacks


def path() -> Path:
    """Return where tvinit is. Raises HostLacks if it was not built (a source tree before `make`)."""
    found = _place()
    if not found.is_file():
        raise HostLacks("the guest program is not built", hint="run: make -C guest")
    return found


@functools.cache
def _place() -> Path:
    return Path(__file__).resolve().parent.parent / "_guest" / "tvinit"


@functools.cache
def digest() -> str:
    """Return the SHA-256 of tvinit, in hex: part of what an ice depends on."""
    return hashlib.sha256(path().read_bytes()).hexdigest()
