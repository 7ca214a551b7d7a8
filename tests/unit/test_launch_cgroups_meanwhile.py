"""Control groups that go while they are made or waited for: what the kernel says then."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trivisor.launch import cgroup_make
from trivisor.launch.cgroup_layout import Hierarchy
from trivisor.launch.cgroup_place import Place, await_event


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_a_home_s_group_that_goes_as_one_is_made_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Its last machine's was removed in between: it is made again."""
    place = Place(tmp_path / "home/machine", frozenset({"memory"}), False)
    mkdir, went = Path.mkdir, []

    def going(path: Path, *args: int, **named: bool) -> None:
        if path == place.path and not went:
            went.append(path.parent.rmdir())
            raise OSError(number, os.strerror(number))
        mkdir(path, *args, **named)

    monkeypatch.setattr(Path, "mkdir", going)
    cgroup_make.make(Hierarchy(tmp_path, frozenset({"memory"}), False), place)
    assert went and place.path.is_dir()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_one_that_is_gone_has_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def gone(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", gone)
    assert await_event(Place(tmp_path, frozenset(), True), "populated", 0, 0)
