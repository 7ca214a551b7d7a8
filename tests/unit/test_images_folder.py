"""Folders of the host as images, and the catalog of names."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
from pathlib import Path

import pytest
from images_for_tests import mini_image, mini_root
from squash_support import contents, extracted, imported, left, listing, make_home
from tar_maker import END, file

from trivisor.core.errors import CallerError, ImageError, InvalidSpec, NotFound, StorageError
from trivisor.images.catalog import Images
from trivisor.images.limits import Limits

ROOT = os.geteuid() == 0


def test_a_folder_arrives_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "etc/resolv.conf").write_text("as it was")
    (source / "etc/link").symlink_to("/etc/../nowhere//else/.")
    (source / "etc/hard").hardlink_to(source / "etc/resolv.conf")
    os.mkfifo(source / "fifo", 0o600)
    (source / "run").mkdir(mode=0o700)
    (source / "secret").write_bytes(b"s" * 100_000)
    (source / "secret").chmod(0o4711)
    os.utime(source / "secret", (1, 86400))
    os.setxattr(source / "secret", "user.a", b"b\0c")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "socket"))
        image = Images(make_home(tmp_path)).import_(source, "x")
    found = listing(image)
    owner = f"{os.geteuid()}/{os.getegid()}"
    assert found["secret"] == f"-rws--x--x {owner} 100000 1970-01-02 00:00"
    assert found["etc/link"].endswith(" -> /etc/../nowhere//else/.")
    assert found["fifo"].startswith("prw-------") and "socket" not in found
    assert found["run"].startswith("drwx------")
    root = extracted(image, tmp_path / "out")
    assert (root / "etc/hard").stat().st_ino == (root / "etc/resolv.conf").stat().st_ino
    assert os.getxattr(root / "secret", "user.a") == b"b\0c"
    assert contents(image, "etc/resolv.conf") == b"as it was"


@pytest.mark.skipif(not ROOT, reason="needs root to make device nodes and give files away")
def test_nodes_and_owners(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "dev").mkdir(parents=True)
    (source / "a").write_text("a")
    os.chown(source / "a", 1234, 5678)
    os.mknod(source / "dev/null", 0o20666, os.makedev(1, 3))
    os.mknod(source / "hidden", 0o20000, 0)
    images = Images(make_home(tmp_path))
    found = listing(images.import_(source, "x"))
    assert " 1234/5678 " in found["a"] and "dev/null" not in found and "hidden" not in found
    os.mknod(source / "sda", 0o60600, os.makedev(8, 0))
    with pytest.raises(ImageError, match="'sda': is a device node"):
        images.import_(source, "x")
    assert left(make_home(tmp_path)) == []


@pytest.mark.skipif(ROOT, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").touch(mode=0)
    with pytest.raises(ImageError, match="Permission denied"):
        Images(make_home(tmp_path)).import_(source, "x")


def test_limits_and_empty_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    images = Images(make_home(tmp_path))
    with pytest.raises(ImageError, match="nothing in it"):
        images.import_(source, "x")
    (source / "big").write_bytes(b"")
    os.truncate(source / "big", 1 << 40)
    with pytest.raises(ImageError, match="larger than the limit"):
        images.import_(source, "x")
    (source / "big").unlink()
    for number in range(20):
        (source / str(number)).touch()
    with pytest.raises(ImageError, match="over 10 entries"):
        images.import_(source, "x", limits=Limits(entries=10))


def test_same_folder_same_digest(tmp_path: Path) -> None:
    root = mini_root(tmp_path / "root", "sh cat")
    images = Images(make_home(tmp_path))
    assert images.import_(root, "x").digest == images.import_(root, "y").digest


def test_the_mini_image_runs(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("needs root for chroot")
    root = extracted(mini_image(make_home(tmp_path)), tmp_path / "out")
    done = subprocess.run(["chroot", root, "/bin/sh", "-c", "echo hello | cat; ls -d /tmp"], capture_output=True, check=True)
    assert done.stdout == b"hello\n/tmp\n"


# The catalog


def test_names(tmp_path: Path) -> None:
    images = Images(make_home(tmp_path))
    assert images.list() == []
    with pytest.raises(NotFound) as caught:
        images.get("debian")
    assert "trivisor images bootstrap" in caught.value.hint
    image = imported(tmp_path, file("a") + END)
    assert image.name == "x:latest" and images.get("x") == images.get("x:latest") == image
    assert images.rootfs(image.digest) == image.rootfs and image.rootfs.exists()
    assert image.size == images.layers(image.digest)[0].size == images.store.path(image.layers[0].digest).stat().st_size
    with pytest.raises(NotFound) as caught:
        images.get("y")
    assert "x:latest" in caught.value.hint
    for bad in ("", "A", "x:", ":x", "../x", "x/../y", "x y", "x:a/b", "-x", "x" * 300, "x\n", "x:latest\n", "/x", "x//y"):
        with pytest.raises(InvalidSpec):
            images.get(bad)
        with pytest.raises(InvalidSpec):
            images.import_(tmp_path, bad)


def test_removal_and_pins(tmp_path: Path) -> None:
    image = imported(tmp_path, file("a") + END)
    images = Images(make_home(tmp_path))
    images.pin(image, "web")
    with pytest.raises(CallerError, match="used by web") as caught:
        images.remove("x")
    assert caught.value.hint
    images.import_(tmp_path / "archive", "y")  # the same root has two names now: one may go
    root = images.rootfs(image.digest)
    images.remove("x")
    assert images.store.exists(image.digest) and root.exists()
    images.unpin("web")
    images.unpin("web")
    images.remove("y:latest")
    assert not root.exists() and images.list() == [] and not blobs(images)
    with pytest.raises(NotFound):
        images.pin(image, "web")
    with pytest.raises(NotFound):
        images.remove("x")


def test_a_name_that_moves_keeps_the_root_of_its_machines(tmp_path: Path) -> None:
    old = imported(tmp_path, file("a", b"old") + END)
    images = Images(make_home(tmp_path))
    images.pin(old, "web")
    middle = imported(tmp_path, file("a", b"middle") + END)
    new = imported(tmp_path, file("a", b"new") + END)
    there = images.store.exists
    assert there(old.digest) and there(old.layers[0].digest) and not there(middle.digest) and images.get("x") == new
    images.unpin("web")
    assert images.collect() > 0 and not there(old.digest) and len(blobs(images)) == 3


def blobs(images: Images) -> list[Path]:
    return list((images.store.root / "blobs/sha256").iterdir())


def test_a_damaged_layer_is_noticed_and_put_right(tmp_path: Path) -> None:
    image = imported(tmp_path, file("a") + END)
    images = Images(make_home(tmp_path))
    assert images.check() == []
    blob = images.store.path(image.layers[0].digest)
    blob.chmod(0o600)
    os.truncate(blob, 100)
    with pytest.raises(StorageError, match="damaged"):
        Images(make_home(tmp_path)).get("x")
    (said,) = images.check()
    assert "x:latest" in said and image.layers[0].digest in said
    assert imported(tmp_path, file("a") + END).digest == image.digest
    assert Images(make_home(tmp_path)).get("x").size == image.size


def _import_loop(home: Path, source: Path, results: multiprocessing.Queue) -> None:
    try:
        images = Images(make_home(home))
        for _ in range(5):
            images.import_(source, "x")
            images.collect()
        results.put("done")
    except BaseException as error:
        results.put(repr(error))


def test_two_processes_import_the_same_name(tmp_path: Path) -> None:
    sources = []
    for number in range(3):
        sources.append(tmp_path / str(number))
        sources[-1].write_bytes(file("a", b"%d" % number) + END)
    results: multiprocessing.Queue = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=_import_loop, args=(tmp_path, source, results)) for source in sources]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == ["done"] * 3
    for worker in workers:
        worker.join()
    image = Images(make_home(tmp_path)).get("x")
    assert contents(image, "a") in (b"0", b"1", b"2")
    assert left(make_home(tmp_path)) == [] and len(blobs(Images(make_home(tmp_path)))) == 3
