"""Which Trivisor this is."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def version() -> str:
    """Return the version that is installed, or of the source tree that this is run from; "unknown" where neither is told."""
    try:
        return importlib.metadata.version("trivisor")
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        project = tomllib.loads(_PROJECT.read_text())["project"]
        return f"{project['version']}+source" if project["name"] == "trivisor" else "unknown"
    except (OSError, ValueError, KeyError):  # a copy of the package alone
        return "unknown"
