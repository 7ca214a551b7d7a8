"""The file system of the home is full: each verb says so, loses nothing, leaves nothing, and works again when there is room."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_state import assert_nothing_left
from images_for_tests import mini_root

from trivisor import VMM, FileError, State, StorageError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
SIZE = 800 << 20


@contextlib.contextmanager
def mounted(device: Path, mount: Path) -> Iterator[Path]:
    """The home on the file system in the file `device`."""
    mount.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop", device, mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount a file")
    try:
        yield mount / "home"
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, iced_home: Path) -> Iterator[Path]:
    """A file system (ext4 as most are, not a tmpfs) with a home that has kit, image and blank ice, in a file."""
    folder = tmp_path_factory.mktemp("full")
    device = folder / "device"
    with device.open("wb") as stream:
        stream.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", device], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    with mounted(device, folder / "small") as home:
        shutil.copytree(iced_home, home, ignore=shutil.ignore_patterns("ice", "ran-*", "path-*", "full-*", "trees"), symlinks=True)
        (home / "ice").mkdir()
        with VMM(home) as vmm, vmm.run("debian", wall="vm", disk="1G"):
            pass
        subprocess.run(["sync", "--file-system", home], check=True)
    yield device
    shutil.rmtree(folder)


@pytest.fixture
def small(tmp_path: Path, template: Path) -> Iterator[Path]:
    """A home on a file system of its own, at the one place where the ice finds its kit."""
    device = tmp_path / "device"
    subprocess.run(["cp", "--sparse=always", template, device], check=True)
    with mounted(device, template.with_name("small")) as home:
        yield home
        (home.parent / "filler").unlink(missing_ok=True)
        with VMM(home) as vmm:
            for machine in vmm.list():
                machine.delete(force=True)
        assert_nothing_left(home, set())
    device.unlink()


def fill(home: Path, leave: int = 0) -> Path:
    """Use up the file system but for `leave` bytes."""
    filler = home.parent / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    size = 0
    for step in (1 << 26, 1 << 20, 1 << 16, 1 << 12):
        with contextlib.suppress(OSError):
            while True:
                os.posix_fallocate(fd, size, step)
                size += step
    os.ftruncate(fd, size - leave)
    os.close(fd)
    return filler


@pytest.mark.parametrize("leave", [0, 64 << 10])
def test_create_and_start(small: Path, leave: int) -> None:
    with VMM(small) as vmm:
        old = vmm.create("debian", wall="vm", disk="1G", name="old")
        ram = vmm.create("debian", wall="vm", memory="192M", disk="ram", name="ram")
        before = {machine.id for machine in vmm.list()}
        filler = fill(small, leave)
        with pytest.raises(StorageError) as caught:
            vmm.create("debian", wall="vm", disk="1G", name="new")
        assert caught.value.hint
        assert {machine.id for machine in vmm.list()} == before
        with pytest.raises(StorageError) as caught:
            ram.start()  # its shape has no ice yet, and there is no room for any
        assert caught.value.hint
        assert ram.state is State.CREATED
        filler.unlink()
        for machine in (old, ram):
            machine.start()
            assert machine.exec(["echo", "here"]).text == "here\n"
            machine.stop()
        vmm.create("debian", wall="vm", disk="1G", name="new").delete()
    with VMM(small) as vmm:
        assert_nothing_left(small, {machine.id for machine in vmm.list()})


def test_a_running_machine(small: Path, tmp_path: Path) -> None:
    """It writes to its disk, which cannot grow: the guest sees an error and not the host; what was synced is not lost."""
    with VMM(small) as vmm:
        machine = vmm.create("debian", wall="vm", disk="1G")
        machine.start()
        machine.exec("echo kept >/root/file; sync", check=True)
        filler = fill(small, 1 << 20)
        (tmp_path / "large").write_bytes(os.urandom(48 << 20))
        # Into the guest's page cache it goes; to the disk it does not.
        with contextlib.suppress(FileError):
            machine.files.upload(tmp_path / "large", "/root/large", timeout=60)
            assert machine.exec("sync /root/large", timeout=60).exit_code != 0
        assert machine.exec(["echo", "alive"], timeout=60).text == "alive\n"
        with contextlib.suppress(StorageError):  # even a note of what is done may find no room
            machine.pause()
        assert machine.state in (State.RUNNING, State.PAUSED)
        filler.unlink()
        machine.stop()
        assert machine.state is State.STOPPED
        machine.start()
        assert machine.files.read_text("/root/file") == "kept\n"


def test_a_freeze(small: Path) -> None:
    """With no room for the first file, for its RAM, or for the rest of that: it goes on, and nothing of a copy is left."""
    with VMM(small) as vmm:
        machine = vmm.create("debian", wall="vm", memory="192M", disk="1G")
        machine.start()
        for leave in (0, 256 << 10, 40 << 20):
            filler = fill(small, leave)
            for freeze in (machine.fork, machine.suspend, lambda: machine.snapshot("full")):
                with pytest.raises(StorageError) as caught:
                    freeze()
                assert caught.value.hint
                assert machine.exec(["echo", "here"], timeout=30).text == "here\n"
            filler.unlink()
            assert [each.name for each in vmm.list()] == [machine.name]
            assert vmm.snapshots.list() == []
        machine.fork()[0].delete(force=True)
        machine.suspend()
        machine.resume()
        assert machine.exec(["echo", "here"], timeout=30).text == "here\n"


def test_verbs_that_need_no_room(small: Path) -> None:
    """Everything that makes room, or changes little, works on a full disk."""
    with VMM(small) as vmm:
        machine = vmm.create("debian", wall="vm", disk="1G")
        machine.start()
        fill(small)
        assert machine.exec(["echo", "here"]).text == "here\n"
        machine.delete(force=True)
        assert vmm.list() == []
        (small.parent / "filler").unlink()


def test_an_import(small: Path, tmp_path: Path) -> None:
    root = mini_root(tmp_path / "root")
    with VMM(small) as vmm:
        filler = fill(small, 256 << 10)
        with pytest.raises(StorageError) as caught:
            vmm.images.import_(root, "mini")
        assert caught.value.hint
        assert [image.name for image in vmm.images.list()] == ["debian:latest"]
        filler.unlink()
        vmm.images.import_(root, "mini")
        with vmm.run("mini", wall="vm", disk="1G") as machine:
            assert machine.exec(["echo", "here"]).text == "here\n"


def test_a_download(small: Path, tmp_path: Path) -> None:
    with VMM(small) as vmm:
        machine = vmm.create("debian", wall="vm", disk="1G")
        machine.start()
        machine.exec("head -c 4M /dev/urandom >/root/data", check=True)
        filler = fill(small, 1 << 20)
        with pytest.raises(StorageError):
            machine.files.download("/root/data", small.parent / "data")
        filler.unlink()
        machine.files.download("/root/data", small.parent / "data")
        assert (small.parent / "data").stat().st_size == 4 << 20
