"""Files of the vm wall: sparse copies, locks, disk templates, ice that is whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from trivisor.core.errors import StorageError
from trivisor.core.paths import Home
from trivisor.vmm.engines.vm import disks, files, ice, kit

MIB = 1 << 20


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.open()
    return home


def test_sparse_copy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as stream:
        stream.truncate(64 * MIB)
        stream.seek(5 * MIB)
        stream.write(b"x" * 10000)
        stream.seek(40 * MIB)
        stream.write(b"y")
    files.copy_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < MIB
    memory = os.memfd_create("copy")
    with source.open("rb") as stream:
        files.copy_sparse(stream.fileno(), memory)
    assert os.pread(memory, 10001, 5 * MIB) == b"x" * 10000 + b"\0"
    assert os.fstat(memory).st_blocks * 512 < MIB
    os.close(memory)


def test_lock_waits_and_tells(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    told = threading.Event()
    with files.locked(path, lambda: None, timeout=0):
        with pytest.raises(files.Held), files.locked(path, lambda: None, timeout=0):
            pass
        holder = os.open(path, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    done: list[bool] = []

    def wait() -> None:
        with files.locked(path, told.set, timeout=20):
            done.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    assert told.wait(10)
    assert not done
    os.close(holder)
    thread.join(10)
    assert done


def test_a_removed_lock_is_no_lock(tmp_path: Path) -> None:
    """Whoever waited for a lock that a sweep removes gets the new one."""
    path = tmp_path / "lock"
    with files.locked(path, lambda: None, timeout=0):
        path.unlink()
        with files.locked(path, lambda: None, timeout=5):
            assert path.exists()


def test_workspace_goes(home: Home) -> None:
    with files.workspace(home, "thing") as work:
        assert work.name.startswith(f"{os.getpid()}-")
        (work / "file").write_text("x")
    assert list(home.tmp.iterdir()) == []


def _make(root: Path) -> None:
    disks.template(Home(root), 64 * MIB)


@pytest.mark.parametrize("size", [16 * MIB, 100 * MIB + 5, 8 << 30, 200 << 30], ids=["16M", "odd", "8G", "200G"])
def test_disk_template(home: Home, tmp_path: Path, size: int) -> None:
    made = disks.template(home, size)
    assert made == disks.template(home, size)
    assert made.stat().st_blocks * 512 < 24 * MIB
    disk = tmp_path / "disk.qcow2"
    disks.create(home, size, disk)
    info = json.loads(subprocess.run(["qemu-img", "info", "--output=json", disk], capture_output=True, check=True).stdout)
    assert info["virtual-size"] == size // 4096 * 4096
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True, timeout=60)
    checker = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert checker is not None
    checked = subprocess.run([checker, "-fn", raw], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout
    assert list(home.tmp.iterdir()) == []


def test_templates_made_at_once(home: Home) -> None:
    makers = [multiprocessing.get_context("spawn").Process(target=_make, args=(home.root,)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
        assert maker.exitcode == 0
    assert [path.name for path in home.cache.iterdir()] == [f"disk-{64 * MIB}-2.qcow2"]
    assert list(home.tmp.iterdir()) == []


def make_ice(home: Home, name: str, needs: dict[str, str] | None = None, form: int = 2) -> Path:
    folder = home.ice / name
    folder.mkdir()
    (folder / "ram").write_bytes(bytes(4096))
    (folder / "state").write_bytes(b"state")
    digest = hashlib.sha256(b"state").hexdigest()
    facts = {
        "format": form,
        "key": name,
        "argv": [],
        "needs": needs or {},
        "memory": 4096,
        "state_digest": digest,
        "disk_digest": "",
        "made": 0.0,
    }
    (folder / "ice.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("damage", ["ram", "state", "ice.json"])
def test_damaged_ice_is_dropped(home: Home, damage: str) -> None:
    folder = make_ice(home, "a" * 32)
    assert ice.find(home, "a" * 32) is not None
    (folder / damage).write_bytes(b"cut")
    assert ice.find(home, "a" * 32) is None
    assert not folder.exists()
    assert list(home.tmp.iterdir()) == []


def test_sweep_takes_what_is_of_no_use(home: Home, tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("1")
    needs = {str(program): ice.identity(program)}
    for name in "abcde":
        make_ice(home, name * 32, needs, form=1 if name == "e" else 2)
    (home.ice / ("b" * 32) / "ice.json").write_text("{")
    os.utime(home.ice / ("c" * 32), (0, 0))
    said = ice.sweep(home)
    assert [path.name for path in sorted(home.ice.iterdir()) if path.is_dir()] == ["a" * 32, "d" * 32]
    assert len(said) == 3 and said[-1].endswith("this version cannot use it")
    with ice.using(home, "a" * 32, lambda _: None) as held:
        assert held is not None
        program.write_text("another")
        ice.sweep(home)
        assert held.ram.exists(), "a clone is being started from it"
        assert not (home.ice / ("d" * 32)).exists()
    ice.sweep(home)
    assert [path for path in home.ice.iterdir() if path.is_dir()] == []


def test_a_home_that_cannot_be_written(home: Home) -> None:
    shutil.rmtree(home.tmp)
    with pytest.raises(StorageError, match="making disk"):
        disks.template(home, 32 * MIB)


def test_kits_of_an_earlier_form_are_swept(home: Home) -> None:
    for name, text in (("micro-1", '{"format": 1}'), ("full-3", "{")):
        (home.kits / name).mkdir()
        (home.kits / name / "kit.json").write_text(text)
    with files.locked(home.kits / "full-3.lock", lambda: None, timeout=0):
        assert kit.sweep(home) == ["kit micro-1: removed, this version cannot use it"]
    assert sorted(path.name for path in home.kits.iterdir()) == ["full-3", "full-3.lock"]
