"""A machine's folder goes, even while something still writes into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from trivisor.vmm import reconcile


def test_a_file_that_comes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "machine"
    (folder / "layer").mkdir(parents=True)
    (folder / "late").touch()
    rmtree, rounds = shutil.rmtree, []

    def late(path: Path) -> None:
        rounds.append(path)
        if len(rounds) == 1:
            os.rmdir(path)  # what the kernel says when something is in it again
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", late)
    reconcile.remove_tree(folder)
    assert len(rounds) == 2
    assert not folder.exists()
