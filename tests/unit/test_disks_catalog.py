"""The disks of a home: names, what lies behind them, and what is left when nobody has them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine_home import KILLED, in_child

from trivisor import VMM
from trivisor.core.devices import Disk
from trivisor.core.errors import AlreadyExists, CallerError, ImageError, InvalidSpec, NotFound, StorageError
from trivisor.images.disks import catalog, qemuimg
from trivisor.images.disks.catalog import Catalog
from trivisor.store.store import Store
from trivisor.vmm import stored

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[VMM]:
    with VMM(tmp_path / "home", engines=[]) as opened:
        yield opened


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.img"
    path.write_bytes(b"first".ljust(1 << 20, b"\0"))
    return path


def blobs(vmm: VMM) -> list[Path]:
    return list((vmm.home / "disks/blobs/sha256").iterdir())


def leftovers(vmm: VMM) -> list[Path]:
    return list((vmm.home / "disks/tmp").iterdir())


def test_the_same_disk_is_there_once(vmm: VMM, raw: Path) -> None:
    assert vmm.disks.list() == [] and not (vmm.home / "disks").exists()
    first, second = vmm.disks.import_(raw), vmm.disks.import_(raw, "second", "raw")
    assert first.name == "raw" and first.digest == second.digest and len(blobs(vmm)) == 1
    assert first.size == 1 << 20 and 0 < first.stored < 1 << 20 and first.format == "raw" and first.source == str(raw)
    assert [disk.name for disk in vmm.disks.list()] == ["raw", "second"]
    assert any(event.kind == "disk-imported" for event in vmm.events())
    vmm.disks.remove("raw")
    assert len(blobs(vmm)) == 1
    vmm.disks.remove("second")
    assert blobs(vmm) == [] and leftovers(vmm) == []


def test_names_are_taken_once_and_well_formed(vmm: VMM, raw: Path) -> None:
    vmm.disks.import_(raw, "data")
    with pytest.raises(AlreadyExists):
        vmm.disks.import_(raw, "data")
    for name in ("Data", "a b", "../x", "-", "a" * 64, "a/b", "disk:a"):
        with pytest.raises(InvalidSpec):
            vmm.disks.import_(raw, name)
    raw.rename(raw.with_name("!.img"))
    with pytest.raises(InvalidSpec, match="as its file is"):
        vmm.disks.import_(raw.with_name("!.img"))
    for verb in (vmm.disks.get, vmm.disks.remove):
        with pytest.raises(NotFound):
            verb("none")
    with pytest.raises(InvalidSpec, match="no format"):
        vmm.disks.import_(raw, "more", "zip")  # type: ignore[arg-type]


def test_what_cannot_be_brought_in_leaves_nothing(vmm: VMM, raw: Path, tmp_path: Path) -> None:
    qemuimg.convert(qemuimg.open_source(raw, "raw"), tmp_path / "cut.qcow2", "qcow2")
    os.truncate(tmp_path / "cut.qcow2", (tmp_path / "cut.qcow2").stat().st_size - 130_000)
    with pytest.raises(ImageError):
        vmm.disks.import_(tmp_path / "cut.qcow2")
    assert blobs(vmm) == [] and leftovers(vmm) == [] and vmm.disks.list() == []


def test_what_a_machine_has_stays(vmm: VMM, raw: Path) -> None:
    disk = vmm.disks.import_(raw, "data")
    own = Catalog(vmm._context.home)
    own.pin(disk.digest, "machine:x")
    with pytest.raises(CallerError, match="machine:x"):
        vmm.disks.remove("data")
    own.unpin("machine:x")
    assert own.digest_of(str(disk.path)) == disk.digest and own.digest_of(str(raw)) is None and own.digest_of("") is None
    vmm.disks.remove("data")
    assert own.collect() == 0


def test_what_cannot_be_attached_leaves_nothing(vmm: VMM, raw: Path) -> None:
    """Its own part and its pin are taken back; a pin that another device of the machine needs stays."""
    disk = vmm.disks.import_(raw, "data")
    context, row = vmm._context, SimpleNamespace(id="abc", name="web")
    own = context.home.machine("abc").root
    own.mkdir()
    for device in (Disk("disk:data"), Disk("disk:data", readonly=True)):
        with pytest.raises(RuntimeError), stored.opened(context, row, "d", device, []) as (opened, fd):  # type: ignore[arg-type]
            assert isinstance(opened, Disk) and fd is not None and context.disks.owners() == {disk.digest: ["machine:abc"]}
            assert (own / "disks/d.qcow2").exists() is not device.readonly
            raise RuntimeError
        assert context.disks.owners() == {} and not (own / "disks/d.qcow2").exists()
    with stored.opened(context, row, "d", Disk("disk:data"), []) as (first, _):  # type: ignore[arg-type]
        pass
    with pytest.raises(RuntimeError), stored.opened(context, row, "e", Disk("disk:data"), [first]):  # type: ignore[arg-type]
        raise RuntimeError
    assert context.disks.owners() == {disk.digest: ["machine:abc"]} and [path.name for path in (own / "disks").iterdir()] == ["d.qcow2"]
    stored.release(context, row, first, [])  # type: ignore[arg-type]
    assert context.disks.owners() == {} and not list((own / "disks").iterdir())


def test_what_the_dead_left_is_swept(vmm: VMM, raw: Path) -> None:
    vmm.disks.import_(raw, "data")
    (vmm.home / "disks/tmp/1-1-abc").mkdir()
    assert any("its maker ended" in words for words in vmm.sweep())
    assert leftovers(vmm) == [] and vmm.disks.get("data")


def test_an_import_that_is_killed_leaves_nothing(vmm: VMM, raw: Path) -> None:
    """Killed while it is converted, and when it lies in the store and has no name yet."""

    def killed(at: str) -> None:
        def told(step: str) -> None:
            if step.startswith(at):
                os.kill(os.getpid(), signal.SIGKILL)

        with VMM(vmm.home, engines=[]) as own:
            if at == "named":
                Store.set_ref = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
            own.disks.import_(raw, "data", progress=told)

    for at in ("reading", "converting", "storing", "named"):
        assert in_child(lambda at=at: killed(at)) == KILLED  # type: ignore[misc]
        assert leftovers(vmm)
        assert any("its maker ended" in words for words in vmm.sweep())
        assert leftovers(vmm) == blobs(vmm) == vmm.disks.list() == []


def test_two_at_once_are_both_whole(vmm: VMM, raw: Path) -> None:
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda number: vmm.disks.import_(raw, f"data-{number}"), range(4)))
    assert len({disk.digest for disk in made}) == 1 and len(vmm.disks.list()) == 4 and len(blobs(vmm)) == 1


def test_a_disk_whose_file_is_gone_is_said_and_can_be_removed(vmm: VMM, raw: Path) -> None:
    vmm.disks.import_(raw, "data")
    blobs(vmm)[0].unlink()
    with pytest.raises(StorageError, match="damaged"):
        vmm.disks.get("data")
    vmm.disks.remove("data")
    assert vmm.disks.list() == []


def test_a_target_is_replaced_whole_or_not_at_all(vmm: VMM, raw: Path, tmp_path: Path) -> None:
    vmm.disks.import_(raw, "data")
    target = tmp_path / "out.raw"
    target.write_text("before")
    with pytest.raises(RuntimeError), catalog.aside(target) as made:
        made.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    assert vmm.disks.export("data", target).format == "raw" and target.read_bytes() == raw.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(AlreadyExists):
        vmm.disks.export("data", tmp_path, "raw")
    with pytest.raises(NotFound):
        vmm.disks.export("data", tmp_path / "none/out.raw")
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "raw.img", "out.raw"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_disk_of_the_home_is_named_as_a_value() -> None:
    assert Disk("disk:data").stored == "data" and Disk("disk:data").format == "qcow2" and Disk("./disk:data").stored == ""
    with pytest.raises(InvalidSpec):
        Disk("disk:No")
    with pytest.raises(InvalidSpec, match="is a qcow2"):
        Disk("disk:data", "raw")
