"""What was asked of a program on this host, kept in the home's cache so that it is asked once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


def identity(path: str, form: int) -> str:
    """Return a name that changes when the program at `path` does, or the `form` of what is kept of it."""
    stat = Path(path).stat()
    return hashlib.sha256(f"{path}:{stat.st_mtime_ns}:{stat.st_size}:{form}".encode()).hexdigest()[:24]


def known(path: Path, kind: type[T]) -> T | None:
    """Return what is kept at `path`, or None."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def keep(path: Path, facts: msgspec.Struct) -> None:
    """Write a cache file aside and rename it. A cache that cannot be written is no failure: it is asked again."""
    aside = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        aside.write_bytes(msgspec.json.encode(facts))
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
