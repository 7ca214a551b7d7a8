"""Volumes as records and folders: what may be shared, and what never leads elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivisor.core.errors import AlreadyExists, InvalidSpec, NotFound, StorageError
from trivisor.core.paths import Home
from trivisor.core.wishes import Volume
from trivisor.vmm import shares
from trivisor.vmm.volumes import Volumes


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.open()
    return home


def test_named_volumes_come_and_go(home: Home) -> None:
    volumes = Volumes(home, list)
    assert volumes.list() == []
    made = volumes.create("cache")
    assert made.path.is_dir() and made.machines == ()
    with pytest.raises(AlreadyExists):
        volumes.create("cache")
    (made.path / "file").write_text("kept")
    shares.prepare(home, {"/a": Volume("cache"), "/b": Volume("other")})
    assert [one.name for one in volumes.list()] == ["cache", "other"]
    assert (made.path / "file").read_text() == "kept"
    volumes.remove("cache")
    assert [one.name for one in volumes.list()] == ["other"]
    assert list(home.tmp.iterdir()) == []
    for call in (volumes.remove, volumes.get):
        with pytest.raises(NotFound):
            call("cache")
    for bad in ("../x", "/etc", "", "A"):
        with pytest.raises(InvalidSpec):
            volumes.get(bad)


def test_a_folder_is_kept_by_where_it_really_is(home: Home, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    settled = shares.settle(home, {"/a": Volume(str(tmp_path / "link"), True), "/b": Volume("named")})
    assert settled == {"/a": Volume(str(tmp_path / "real"), True), "/b": Volume("named")}
    assert shares.folders(home, settled)["/b"] == Volume(str(home.volumes / "named"))


@pytest.mark.parametrize("source", ["{tmp}/nowhere", "{tmp}/file", "{home}", "{home}/store", "/", "{tmp}", "/proc", "/dev", "/sys/kernel"])
def test_what_cannot_be_shared(home: Home, tmp_path: Path, source: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSpec, match="cannot be shared"):
        shares.settle(home, {"/a": Volume(source.format(tmp=tmp_path, home=home.root))})


def test_a_link_that_was_not_there_is_not_followed(home: Home, tmp_path: Path) -> None:
    above = tmp_path / "above"
    (above / "shared").mkdir(parents=True)
    settled = shares.settle(home, {"/a": Volume(str(above / "shared"))})
    shares.prepare(home, settled)
    (above / "shared").rename(above / "away")
    (above / "shared").symlink_to("/etc")
    with pytest.raises(StorageError, match="leads through shared"):
        shares.prepare(home, settled)
    (above / "shared").unlink()
    with pytest.raises(StorageError, match="is gone"):
        shares.prepare(home, settled)
    above.rename(tmp_path / "elsewhere")
    above.symlink_to("elsewhere")
    with pytest.raises(StorageError, match="leads through above"):
        shares.prepare(home, settled)
