"""A home's folders on the disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trivisor.core.errors import StorageError
from trivisor.core.folders import scatter
from trivisor.core.paths import Home


def flags(folder: Path) -> str:
    """As lsattr(1) has them."""
    done = subprocess.run(["lsattr", "-d", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a file system with flags: {done.stderr.strip()}")
    return done.stdout.split()[0]


def test_what_comes_and_goes_is_laid_out_far_apart(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.open()
    if "e" not in flags(home.root):
        pytest.skip("needs ext4")
    for folder, spread in ((home.machines, True), (home.snapshots, True), (home.tmp, True), (home.store, False)):
        assert ("T" in flags(folder)) is spread
    home.open()
    assert home.machines.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.open()
    home.tmp.rmdir()
    home.tmp.write_text("mine")
    with pytest.raises(StorageError, match="cannot be used"):
        home.open()
    assert home.tmp.read_text() == "mine"


def test_a_file_system_without_flags_is_left_alone() -> None:
    scatter(Path("/proc/self"))
