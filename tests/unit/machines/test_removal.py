"""A machine's folder goes, even while something still writes into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from trivisor.launch import keeper
from trivisor.vmm import removal
from trivisor.vmm.machine import Machine
from trivisor.vmm.manager import VMM


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
    removal.remove_tree(folder)
    assert len(rounds) == 2
    assert not folder.exists()


def test_who_looks_meanwhile_puts_no_new_lock_into_it(vmm: VMM, running: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(running.info()["folder"])
    rmtree = shutil.rmtree
    seen: list[object] = []

    def removing(path: Path) -> None:
        if path == folder and not seen:
            (folder / "lock").unlink()
            seen.extend([[found.name for found in vmm.list()], (folder / "lock").exists()])
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", removing)
    running.delete(force=True)
    assert seen == [[running.name], False]
    assert not folder.exists()


def test_a_lock_that_was_taken_away_is_made_again(vmm: VMM, running: Machine) -> None:
    folder = Path(running.info()["folder"])
    keeper.kill(vmm._context.folder(running._first))
    (folder / "lock").unlink()
    assert [(found.state, found.info()["reason"]) for found in vmm.list()] == [("failed", "its keeper was killed")]
    assert (folder / "lock").exists()
