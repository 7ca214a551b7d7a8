"""What confines a container on hosts with and without AppArmor, told from the files by which the kernel says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trivisor.vmm.engines.container import host


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which `enabled` and `profiles` are the kernel's."""
    monkeypatch.setattr(host, "_APPARMOR", tmp_path / "enabled")
    monkeypatch.setattr(host, "_PROFILES", tmp_path / "profiles")
    host.apparmor.cache_clear()
    yield tmp_path
    host.apparmor.cache_clear()


@pytest.mark.parametrize(
    ("enabled", "profiles", "profile", "lacking"),
    [
        (None, None, "", False),
        ("N\n", "docker-default (enforce)\n", "", False),
        ("Y\n", None, "", True),
        ("Y\n", "", "", True),
        ("Y\n", "docker-default-like (enforce)\nusr.bin.man (enforce)\n", "", True),
        ("Y\n", "usr.bin.man (enforce)\ndocker-default (enforce)\n", "docker-default", False),
    ],
)
def test_apparmor(kernel: Path, enabled: str | None, profiles: str | None, profile: str, lacking: bool) -> None:
    """Used where it is on and Docker's profile is loaded; said to lack where it is on and that is not; no word where there is none."""
    for name, text in (("enabled", enabled), ("profiles", profiles)):
        if text is not None:
            (kernel / name).write_text(text)
    assert host.apparmor() == profile
    assert any("AppArmor" in lack for lack in host.lacks()) == lacking
    said = host.confinement()["confined by"]
    assert ("AppArmor (docker-default)" in said) == bool(profile)
    assert ("AppArmor, which is on, but has no profile docker-default loaded" in said) == lacking
