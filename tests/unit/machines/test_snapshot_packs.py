"""What snapshots are kept in: packs, lists, folders that come and go; and what is found to be damaged."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from frozen_engine import FreezingEngine, disk, mind, think, warm, write
from machine_home import TestHome

from trivisor import VMM, Machine, State, StorageError
from trivisor.launch import tvinit
from trivisor.vmm.snapshots import packing
from trivisor.vmm.snapshots.packing import Entry, Manifest, Pack


@pytest.fixture
def vmm(home: TestHome) -> Iterator[VMM]:
    with home.open(FreezingEngine()) as opened:
        yield opened


@pytest.fixture
def web(vmm: VMM, home: TestHome) -> Machine:
    return warm(vmm, home, random.Random(1).randbytes(1 << 20))


def tree(place: Path) -> Path:
    place.mkdir()
    (place / "deep/er").mkdir(parents=True)
    (place / "deep/er/one").write_bytes(b"one\n" * 5000)
    (place / "two").hardlink_to(place / "deep/er/one")
    (place / "link").symlink_to("../../etc")
    with (place / "holes").open("wb") as file:
        file.truncate(64 << 20)
        for at in (0, 5 << 20, (64 << 20) - 7):
            file.seek(at)
            file.write(b"data")
    os.mkfifo(place / "pipe")
    os.setxattr(place / "deep", "user.overlay.opaque", b"y")
    if os.geteuid() == 0:
        os.mknod(place / "deep/gone", stat.S_IFCHR)
        os.chown(place / "deep/er/one", 1234, 77)
    (place / "deep/er/one").chmod(0o4711)
    (place / "deep").chmod(0o1711)
    os.utime(place / "deep", ns=(1, 123456789))
    return place


def seen(place: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        facts = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        marks = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
        nlink = facts.st_nlink if not path.is_dir() else 0
        found[str(path.relative_to(place))] = (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_mtime_ns, nlink, marks, what)
    return found


def test_there_and_back(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    new, entries = packing.pack(source, tmp_path / "pack", [])
    assert new is not None
    manifest = Manifest(packing.FORMAT, [new], entries)
    again = packing.decode(packing.encode(manifest), "it")
    packing.lay(tmp_path / "laid", again, [tmp_path / "pack"])
    assert seen(tmp_path / "laid") == seen(source)
    assert (tmp_path / "laid/holes").stat().st_blocks * 512 < 1 << 20
    assert packing.same(tmp_path / "laid", again)
    assert packing.equal(tmp_path / "laid", again, [tmp_path / "pack"])
    with (tmp_path / "laid/holes").open("r+b") as file:
        file.seek(9 << 20)
        file.write(b"x")
    assert not packing.same(tmp_path / "laid", again)
    assert not packing.equal(tmp_path / "laid", again, [tmp_path / "pack"])
    # Nothing is new to who knows it.
    assert packing.pack(source, tmp_path / "none", [(tmp_path / "pack", new)])[0] is None
    assert not (tmp_path / "none").exists()


def test_a_pack_knows_its_own_digest(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/much").write_bytes(random.Random(2).randbytes(9 << 20))  # more frames than may wait
    new, _ = packing.pack(tmp_path / "source", tmp_path / "pack", [])
    assert new is not None
    assert new.digest == f"sha256:{hashlib.sha256((tmp_path / 'pack').read_bytes()).hexdigest()}"


def test_a_copy_is_all_of_it(tmp_path: Path) -> None:
    """tvinit copy, by which a container's layer is frozen."""
    source, target = tree(tmp_path / "source"), tmp_path / "target"
    deep = source
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    if os.geteuid() == 0:
        (source / "gone too").hardlink_to(source / "deep/gone")  # as the kernel makes whiteouts
    target.mkdir()
    done = subprocess.run([tvinit.path(), "copy", source, target], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert seen(target) == seen(source)
    assert (target / "holes").stat().st_blocks * 512 < 1 << 20
    again = subprocess.run([tvinit.path(), "copy", source, target], capture_output=True, text=True)
    assert again.returncode == 1 and "File exists" in again.stderr
    assert subprocess.run([tvinit.path(), "copy", source], capture_output=True).returncode == 2


def test_each_byte_of_a_pack_counts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(random.Random(2).randbytes(10_000) + b"text " * 2000)
    new, entries = packing.pack(source, tmp_path / "pack", [])
    assert new is not None
    manifest = Manifest(packing.FORMAT, [new], entries)
    whole = (tmp_path / "pack").read_bytes()
    for at in random.Random(3).sample(range(8, len(whole)), 60):
        (tmp_path / "pack").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StorageError, match="damaged"):
            packing.lay(tmp_path / f"laid{at}", manifest, [tmp_path / "pack"])
    (tmp_path / "pack").write_bytes(whole[:-1])
    with pytest.raises(StorageError, match="damaged"):
        packing.lay(tmp_path / "short", manifest, [tmp_path / "pack"])


@pytest.mark.parametrize(
    "bad",
    [
        [Entry(b"../x", "f", 0o644, 0, 0, 0)],
        [Entry(b"/x", "f", 0o644, 0, 0, 0)],
        [Entry(b"..", "d", 0o755, 0, 0, 0)],
        [Entry(b"a", "l", 0o777, 0, 0, 0, target=b"/etc"), Entry(b"a/passwd", "f", 0o644, 0, 0, 0)],
        [Entry(b"a", "f", 0o644, 0, 0, 0), Entry(b"a", "d", 0o755, 0, 0, 0)],
        [Entry(b"a", "b", 0o644, 0, 0, 0)],
        [Entry(b"a", "f", 0o644, 0, 0, 0, link=0)],
        [Entry(b"a", "d", 0o755, 0, 0, 0), Entry(b"b", "d", 0o755, 0, 0, 0, link=0)],
        [Entry(b"a", "f", 0o644, 0, 0, 0, size=10, runs=[(0, 5, 0, 1)])],
        [Entry(b"a", "f", 0o644, 0, 0, 0, size=10, runs=[(9, 0, 0, 1)])],
        [Entry(b"a", "f", -1, 0, 0, 0)],
        [Entry(b"a", "f", 0o644, -1, 0, 0)],
        [Entry(b"a" * 300, "f", 0o644, 0, 0, 0)],
    ],
)
def test_a_list_that_leads_elsewhere(bad: list[Entry]) -> None:
    with pytest.raises(StorageError, match="not one of ours"):
        packing.checked(Manifest(packing.FORMAT, [Pack("", "")], bad))


def test_garbage_is_no_list() -> None:
    for data in (b"", b"\0" * 100, packing.encode(Manifest(99, [], []))):
        with pytest.raises(StorageError):
            packing.decode(data, "it")


def packs(home: TestHome) -> list[Path]:
    return sorted((home.root / "snapshots/packs/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)


def test_a_second_one_adds_what_changed(vmm: VMM, home: TestHome, web: Machine) -> None:
    web.snapshot("one")
    before = sum(path.stat().st_size for path in packs(home))
    data = bytearray(disk(home.folder(web)))
    data[8192:12288] = random.Random(4).randbytes(4096)
    write(home.folder(web), bytes(data))
    web.snapshot("two")
    assert sum(path.stat().st_size for path in packs(home)) - before < 16384
    vmm.snapshots.remove("web@one")
    web.restore("two")  # which needs what the first was kept in
    assert disk(home.folder(web)) == bytes(data)
    vmm.snapshots.remove("web@two")
    web.delete(force=True)
    assert packs(home) == []


def test_a_folder_that_went_is_laid_out_again(vmm: VMM, home: TestHome, web: Machine) -> None:
    taken = web.snapshot("one")
    plain = home.root / "snapshots" / taken.id / "plain"
    shutil.rmtree(plain)
    child = vmm.create(snapshot="web@one")
    child.start()
    assert (mind(home.folder(child)), disk(home.folder(child))) == (b"warm", disk(home.folder(web)))
    assert plain.is_dir()


def test_a_byte_that_changed(vmm: VMM, home: TestHome, web: Machine) -> None:
    taken = web.snapshot("one")
    plain = home.root / "snapshots" / taken.id / "plain"
    good = disk(home.folder(web))
    spoilt = bytes([good[0] ^ 1]) + good[1:]
    (plain / "disk.qcow2").write_bytes(spoilt)
    web.restore("one")
    assert disk(home.folder(web)) == good
    pack = packs(home)[-1]
    (plain / "mind").write_bytes(b"cold")
    whole = pack.read_bytes()
    pack.chmod(0o600)
    pack.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    think(home.folder(web), b"now")
    with pytest.raises(StorageError, match="web@one is damaged"):
        web.restore("one")
    assert (web.state, mind(home.folder(web)), web.info()["base"]) == (State.RUNNING, b"now", taken.id)
    with pytest.raises(StorageError, match="damaged"):
        vmm.create(snapshot="web@one", name="child")
    assert [machine.name for machine in vmm.list()] == ["web"]
    pack.write_bytes(whole)
    web.restore("one")
    assert mind(home.folder(web)) == b"warm"
