"""A disk that is full, or read-only: StorageError with a hint, and nothing lost or left."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from squash_support import contents, left, make_home
from tar_maker import END, file

from trivisor.core.errors import StorageError
from trivisor.images.catalog import Images
from trivisor.store.store import Store

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Use up the disk but for `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb") as handle:
        facts = os.statvfs(disk)
        os.posix_fallocate(handle.fileno(), 0, max(1, facts.f_bavail * facts.f_bsize - leave))
    return filler


def archive(folder: Path, size: int) -> Path:
    path = folder / "archive"
    path.write_bytes(file("a", os.urandom(size)) + END)
    return path


def test_an_import_larger_than_the_disk(disk: Path, tmp_path: Path) -> None:
    home = make_home(disk)
    images = Images(home)
    small = images.import_(archive(tmp_path, 1 << 20), "x")
    with pytest.raises(StorageError, match="No space left") as caught:
        images.import_(archive(tmp_path, 8 << 20), "x")
    assert "TRIVISOR_HOME" in caught.value.hint
    assert images.get("x") == small and left(home) == []
    assert len(contents(small, "a")) == 1 << 20
    assert images.import_(archive(tmp_path, 1 << 20), "x").digest != small.digest


def test_a_packed_archive_of_layers_that_does_not_fit(disk: Path, tmp_path: Path) -> None:
    import gzip

    from test_images_layers import saved

    home = make_home(disk)
    data = gzip.compress(saved([file("a", bytes(16 << 20)) + END]))
    (tmp_path / "archive").write_bytes(data)
    with pytest.raises(StorageError, match="No space left"):
        Images(home).import_(tmp_path / "archive", "x")
    assert left(home) == []


@pytest.mark.parametrize("root", ["lowers", "rootfs"])
def test_a_root_that_does_not_fit(disk: Path, tmp_path: Path, root: str) -> None:
    """Nothing half-made is left, and it is made once there is room."""
    home = make_home(disk)
    images = Images(home)
    data = os.urandom(4096) * 1500 if root == "lowers" else os.urandom(1500 << 10)  # packed it is little; a squashfs packs it as well
    (tmp_path / "archive").write_bytes(file("a", data) + END)
    image = images.import_(tmp_path / "archive", "x")
    filler = fill(disk, 1 << 20)
    with pytest.raises(StorageError, match="No space left") as caught:
        getattr(images, root)(image.digest)
    assert "TRIVISOR_HOME" in caught.value.hint
    assert left(home) == [] and not [path for path in home.cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    filler.unlink()
    if root == "rootfs":
        assert images.rootfs(image.digest).stat().st_size > 1 << 20
    assert images.check() == []


def test_the_disk_fills_anywhere(disk: Path) -> None:
    """With every amount of space from none to enough, page by page: done or refused, and whole either way."""
    store = Store(disk / "store")
    old = store.add(io.BytesIO(b"old" * 5000), "x")
    store.set_ref("name", old, {})
    outcomes = set()
    for pages in range(40):
        filler = fill(disk, pages * 4096)
        try:
            name = store.add(io.BytesIO(b"new" * 5000), "y")
            store.set_ref("name", name, {})
            outcomes.add("done")
        except StorageError as error:
            assert error.hint, error
            outcomes.add("full")
        filler.unlink()
        (ref,) = store.refs()
        assert store.path(ref.digest).stat().st_size == 15000
        store.set_ref("name", old, {})
        store.unpin("y")
        store.collect()
        assert [path.name for path in (store.root / "blobs/sha256").iterdir()] == [old.partition(":")[2]]
        assert list((store.root / "tmp").iterdir()) == []
    assert outcomes == {"done", "full"}


def test_a_full_disk_lets_go(disk: Path) -> None:
    """Space must come back by removing, also when there is none left."""
    store = Store(disk / "store")
    name = store.add(io.BytesIO(os.urandom(2 << 20)), "x")
    store.add(io.BytesIO(b"small"), "y")
    filler = fill(disk, 64 << 10)
    store.unpin("x")
    assert store.collect() == 2 << 20 and not store.exists(name)
    filler.unlink()


def test_a_read_only_disk(disk: Path, tmp_path: Path) -> None:
    home = make_home(disk)
    images = Images(home)
    image = images.import_(archive(tmp_path, 1000), "x")
    images.close()  # the kernel takes no disk away from writers
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        for act in (
            lambda: images.import_(tmp_path / "archive", "y"),
            lambda: images.remove("x"),
            lambda: images.pin(image, "web"),
            lambda: images.collect(),
        ):
            with pytest.raises(StorageError) as caught:
                act()
            assert "TRIVISOR_HOME" in caught.value.hint, caught.value
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert images.get("x") == image
