"""What editors are told of VMM.create and VMM.run is what a Spec takes; and the version is known with and without an installation."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path
from typing import get_type_hints

import pytest

from trivisor import VMM, Spec
from trivisor.core import version
from trivisor.vmm.keywords import Keywords, RunKeywords


def test_keywords_are_the_fields_of_a_spec() -> None:
    fields = set(Spec.__struct_fields__) - {"asked", "image"}
    assert set(get_type_hints(RunKeywords)) == fields
    assert set(get_type_hints(Keywords)) == fields - {"name", "wall"}
    assert "Unpack[Keywords]" in str(inspect.signature(VMM.create))
    assert "Unpack[RunKeywords]" in str(inspect.signature(VMM.run))


def test_version_without_an_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    assert version.version().endswith("+source")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "3"\n')
    for place in (tmp_path / "pyproject.toml", tmp_path / "none"):
        monkeypatch.setattr(version, "_PROJECT", place)
        assert version.version() == "unknown"
