"""Disks from one format into another: the same bytes, holes kept, and qemu-img held to its bounds."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from trivisor.core.errors import EngineError, ImageError, InvalidSpec, NotFound, StorageError
from trivisor.core.units import MIB
from trivisor.images.disks import formats, qemuimg
from trivisor.images.disks.formats import FORMATS, Format
from trivisor.images.disks.headers import Header, read
from trivisor.images.disks.qemuimg import Bounds, Source, convert, open_source
from trivisor.launch import once

SIZE = 24 * MIB
pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with something at both ends and a hole between."""
    path = tmp_path_factory.mktemp("disk") / "some, disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(os.urandom(MIB))
        file.seek(SIZE - 70_000)
        file.write(os.urandom(70_000))
    return path


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_goes_through_every_format(raw: Path, tmp_path: Path, kind: Format) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    told: list[str] = []
    assert convert(open_source(raw, "raw"), there, kind, progress=told.append) == Header(kind, SIZE)
    assert formats.detect(there) == kind
    assert convert(open_source(there, None), back, "raw") == Header("raw", SIZE)
    assert back.read_bytes() == raw.read_bytes()
    assert taken(there) < 12 * MIB and taken(back) < 4 * MIB
    assert told[0].startswith(f"converting raw to {kind}: ") and told[-1].endswith(" 100 %")


def test_the_vmdk_of_packages_is_one_stream(raw: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.vmdk", tmp_path / "back"
    convert(open_source(raw, "raw"), there, "vmdk", stream=True)
    assert there.read_bytes()[:4] == b"KDMV" and b'createType="streamOptimized"' in there.read_bytes()[:4096]
    convert(open_source(there, "vmdk"), back, "raw")
    assert back.read_bytes() == raw.read_bytes()


def test_what_a_machine_wrote_lies_over_what_is_below(raw: Path, tmp_path: Path) -> None:
    """A qcow2 without a backing file in its header is read over a disk that is named here."""
    below, own, flat = tmp_path / "below, it", tmp_path / "own", tmp_path / "flat"
    convert(open_source(raw, "raw"), below, "qcow2")
    qemuimg.create(own, SIZE)
    convert(Source(own, read(own, "qcow2"), below), flat, "raw")
    assert flat.read_bytes() == raw.read_bytes()


def test_a_format_is_the_one_that_is_said(raw: Path, tmp_path: Path) -> None:
    disk = tmp_path / "d.vmdk"
    convert(open_source(raw, "raw"), disk, "qcow2")
    assert open_source(disk, None).header.format == "qcow2"
    assert open_source(disk, "raw").header == Header("raw", disk.stat().st_size // 512 * 512)
    with pytest.raises(InvalidSpec, match="is qcow2, not vmdk"):
        open_source(disk, "vmdk")
    with pytest.raises(NotFound):
        open_source(tmp_path / "none", None)
    with pytest.raises(InvalidSpec, match="not a file"):
        open_source(tmp_path, None)
    with pytest.raises(InvalidSpec, match="no format"):
        formats.of_name(Path("disk.zip"))
    assert [formats.of_name(Path(f"x.{end}")) for end in ("img", "VMDK", "vpc")] == ["raw", "vmdk", "vhd"]


def test_a_disk_is_no_larger_than_its_bound(raw: Path) -> None:
    with pytest.raises(ImageError, match="the bound is"):
        open_source(raw, "raw", Bounds(virtual=SIZE - 1))


def test_a_target_that_is_there_is_left_alone(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(StorageError, match="cannot be made"):
        convert(open_source(raw, "raw"), tmp_path / "there", "qcow2")
    assert (tmp_path / "there").read_text() == "mine"


def test_what_writes_too_much_is_ended(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemuimg, "_OVERHEAD", -SIZE)
    source = open_source(raw, "raw")
    with pytest.raises(ImageError, match=r"signal|too large"):
        convert(source, tmp_path / "there", "raw")
    assert not (tmp_path / "there").exists()


def test_time_and_memory_are_bounded(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"took over 0\.001 s"):
        convert(open_source(raw, "raw"), tmp_path / "there", "qcow2", bounds=Bounds(seconds=0.001))
    with pytest.raises((ImageError, EngineError)):
        convert(open_source(raw, "raw"), tmp_path / "there", "qcow2", bounds=Bounds(memory=4 * MIB))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhdx", "vhd", "vdi"])
def test_an_image_that_was_cut_is_not_read_as_zeros(raw: Path, tmp_path: Path, kind: Format) -> None:
    disk = tmp_path / "part"
    convert(open_source(raw, "raw"), disk, kind)
    qemuimg.verify(open_source(disk, None))
    whole = disk.read_bytes()
    # A VHD's footer is its end; what is cut there is found without that, too.
    disk.write_bytes(whole[:-90_000] + (whole[-512:] if kind == "vhd" else b""))
    with pytest.raises(ImageError, match=r"cut|truncated"):
        source = open_source(disk, kind)
        qemuimg.verify(source)
        convert(source, tmp_path / "there", "raw")
    assert not (tmp_path / "there").exists()


def test_what_an_image_names_is_not_there_to_be_opened(raw: Path, tmp_path: Path) -> None:
    """Were a header believed, the jail would still hold: a backing file that is there is not found."""
    own, secret = tmp_path / "own.qcow2", tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(SIZE, b"\0"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", own], check=True)
    with pytest.raises(ImageError, match="has a backing file"):
        open_source(own, None)
    with pytest.raises(ImageError, match=r"No such file|Permission denied"):
        convert(Source(own, Header("qcow2", SIZE)), tmp_path / "there", "raw")
    assert not (tmp_path / "there").exists()


def test_an_interrupt_ends_it_and_leaves_nothing(raw: Path, tmp_path: Path) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(open_source(raw, "raw"), tmp_path / "there", "qcow2", progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file system of its own is mounted")
def test_a_full_disk_is_said(raw: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    try:
        with pytest.raises(StorageError, match="disk is full"):
            convert(open_source(raw, "raw"), small / "there", "qcow2")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_plan_is_run_to_its_end() -> None:
    done = once.run((("namespaces", "pid"), ("exec", "/bin/sh", "-c", "echo out; echo said >&2; exit 3")), 10.0)
    if done.status == 125:
        pytest.skip("needs a pid namespace")
    assert (done.status, done.out, done.said, done.timed_out) == (3, b"out\n", "said", False)
    begun = time.monotonic()
    done = once.run((("exec", "/bin/sh", "-c", "sleep 60"),), 0.2)
    assert done.timed_out and time.monotonic() - begun < 30
    done = once.run((("namespaces", "pid"), ("exec", "/bin/sh", "-c", f"kill -{signal.SIGKILL.value} $$; sleep 60")), 0.5)
    assert done.timed_out or done.status == 128 + signal.SIGKILL


def test_bounds_are_values() -> None:
    assert dataclasses.replace(qemuimg.DEFAULT, memory=1).virtual == 16 << 40
