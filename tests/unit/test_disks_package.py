"""Packages (OVA, OVF): their files, their order and their manifest; in, and out again."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor import VMM
from trivisor.core.errors import AlreadyExists, ImageError, InvalidSpec, NotFound, TrivisorError
from trivisor.core.units import GIB, MIB
from trivisor.images.disks import package, qemuimg
from trivisor.images.disks.ovf import Card
from trivisor.images.disks.ovfwrite import Machine, render

SIZE = 2 * MIB
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A stream-optimised VMDK."""
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img (qemu-utils)")
    folder = tmp_path_factory.mktemp("disk")
    (folder / "raw").write_bytes(b"content".ljust(SIZE, b"\0"))
    qemuimg.convert(qemuimg.open_source(folder / "raw", "raw"), folder / "vmdk", "vmdk", stream=True)
    return (folder / "vmdk").read_bytes()


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[VMM]:
    with VMM(tmp_path / "home", engines=[]) as opened:
        yield opened


def manifest(members: Members, kind: str = "SHA256") -> tuple[str, bytes]:
    return "a.mf", "".join(f"{kind}({name})= {hashlib.new(kind, data).hexdigest()}\n" for name, data in members).encode()


def parts(*disks: bytes) -> Members:
    files = {f"a-disk{number}.vmdk": data for number, data in enumerate(disks, 1)}
    text = render(Machine("a", 2, GIB, (Card("VM Network"),)), {name: (len(data), SIZE) for name, data in files.items()})
    return [("a.ovf", text.encode()), *files.items()]


def ova(folder: Path, members: Members, **changes: object) -> Path:
    path = folder / "a.ova"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value if name.endswith("disk1.vmdk") else getattr(info, key))
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_package_comes_in(vmm: VMM, disk: bytes, tmp_path: Path) -> None:
    members = parts(disk)
    found = vmm.disks.import_package(ova(tmp_path, [members[0], manifest(members), *members[1:]]), "web")
    assert (found.name, found.cpus, found.memory, found.cards) == ("a", 2, GIB, (Card("VM Network"),))
    assert found.wishes == {"cpus": 2, "memory": GIB, "network": "nat"}
    assert [one.name for one in found.disks] == ["web"] == [one.name for one in vmm.disks.list()]
    assert found.disks[0].format == "vmdk" and found.disks[0].source == f"{tmp_path / 'a.ova'}: a-disk1.vmdk"
    vmm.disks.export("web", tmp_path / "out", "raw")
    assert (tmp_path / "out").read_bytes() == b"content".ljust(SIZE, b"\0")
    with pytest.raises(AlreadyExists):
        vmm.disks.import_package(tmp_path / "a.ova", "web")


def test_several_disks_come_in_together_or_not_at_all(vmm: VMM, disk: bytes, tmp_path: Path) -> None:
    assert [one.name for one in vmm.disks.import_package(ova(tmp_path, parts(disk, disk))).disks] == ["a-1", "a-2"]
    with pytest.raises(ImageError, match="no format"):
        vmm.disks.import_package(ova(tmp_path, parts(disk, b"not a disk")), "other")
    assert [one.name for one in vmm.disks.list()] == ["a-1", "a-2"]
    vmm.disks.remove("a-1")
    with pytest.raises(AlreadyExists):
        vmm.disks.import_package(ova(tmp_path, parts(disk, disk)), "a")
    assert [one.name for one in vmm.disks.list()] == ["a-2"]
    assert list((vmm.home / "disks/tmp").iterdir()) == []


def test_an_empty_disk_is_made(vmm: VMM, disk: bytes, tmp_path: Path) -> None:
    name, text = parts(disk)[0]
    empty = text.replace(b'    <File ovf:id="file1"', b'    <File ovf:id="other"').replace(b' ovf:fileRef="file1"', b"")
    assert vmm.disks.import_package(ova(tmp_path, [(name, empty), parts(disk)[1]])).disks[0].size == SIZE


def test_packed_files_are_unpacked_in_bounds(disk: bytes, tmp_path: Path) -> None:
    packed = gzip.compress(disk)
    envelope = parts(packed)[0][1].replace(b"ovf:href=", b'ovf:compression="gzip" ovf:href=')
    members = [("a.ovf", envelope), ("a-disk1.vmdk", packed)]
    with package.opened(ova(tmp_path, [members[0], manifest(members), members[1]])) as opened:
        opened.disk("a-disk1.vmdk", tmp_path / "copy", len(disk))
        with pytest.raises(ImageError, match="larger than"):
            opened.disk("a-disk1.vmdk", tmp_path / "copy2", len(disk) - 1)
    assert (tmp_path / "copy").read_bytes() == disk
    for bad, said in ((packed[:-20], "was cut"), (b"no gzip".ljust(len(packed)), "cannot be unpacked")):
        text = envelope.replace(str(len(packed)).encode(), str(len(bad)).encode())
        with package.opened(ova(tmp_path, [("a.ovf", text), ("a-disk1.vmdk", bad)])) as opened, pytest.raises(ImageError, match=said):
            opened.disk("a-disk1.vmdk", tmp_path / f"copy {said}", len(disk))


@pytest.mark.parametrize("kind", ["SHA1", "SHA256", "SHA512"])
@pytest.mark.parametrize("end", [False, True])
def test_a_manifest_is_checked(disk: bytes, tmp_path: Path, kind: str, end: bool) -> None:
    members = parts(disk)
    signed = [manifest(members, kind), ("a.cert", b"whatever")]
    path = ova(tmp_path, [*members, *signed] if end else [members[0], *signed, *members[1:]])
    with package.opened(path) as opened:
        opened.disk("a-disk1.vmdk", tmp_path / "copy", 0)
    assert (tmp_path / "copy").read_bytes() == disk
    path = ova(tmp_path, [members[0], manifest([members[0], ("a-disk1.vmdk", disk[:-1])], kind), members[1]])
    with package.opened(path) as opened, pytest.raises(ImageError, match="not what the manifest says"):
        opened.disk("a-disk1.vmdk", tmp_path / "copy2", 0)
    path = ova(tmp_path, [members[0], manifest([("a.ovf", b""), members[1]], kind), members[1]])
    with pytest.raises(ImageError, match=r"a\.ovf is not what"), package.opened(path):
        pass


def wrong(disk: bytes) -> dict[str, Members]:
    envelope, file = parts(disk)
    good = manifest([envelope, file])
    return {
        "begin with an envelope": [file, envelope],
        "order": [envelope, *reversed(parts(disk, disk)[1:])],
        "two files": [envelope, file, file],
        "no name of a file": [envelope, ("../" + file[0], disk)],
        "is no name of": [envelope, ("/etc/passwd", disk)],
        "'./a-disk1.vmdk'": [envelope, ("./" + file[0], disk)],
        "is not there": [envelope],
        "has 5 bytes": [envelope, (file[0], b"12345")],
        "does not name": [envelope, file, ("more.iso", b"")],
        "says nothing of": [envelope, manifest([envelope]), file],
        "which it does not have": [envelope, manifest([envelope, file, ("b.vmdk", b"")]), file],
        "makes no sense": [envelope, ("a.mf", good[1] + b"hello\n"), file],
        "makes no sense: 'SHA256": [envelope, ("a.mf", b"SHA256(a.ovf)= " + b"a" * 40), file],
        "names a.ovf twice": [envelope, ("a.mf", good[1] + good[1]), file],
        "is empty": [envelope, ("a.mf", b"\n"), file],
        "a.mf is over": [envelope, ("a.mf", bytes(2 << 20)), file],
        "in the order": [envelope, file, ("a.cert", b""), good],
    }


@pytest.mark.parametrize("said", wrong(b"x"))
def test_what_is_refused_of_a_tar(disk: bytes, tmp_path: Path, said: str) -> None:
    members = wrong(disk)[said]
    if said == "order":
        members = [parts(disk, disk)[0], *members[1:]]
    with pytest.raises(ImageError) as caught, package.opened(ova(tmp_path, members)):
        pass
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_package_holds_plain_files(disk: bytes, tmp_path: Path, kind: bytes) -> None:
    members = [(name, data if name == "a.ovf" else b"") for name, data in parts(disk)]
    with (
        pytest.raises(ImageError, match=r"plain file|link"),
        package.opened(ova(tmp_path, members, type=kind, linkname="/etc/passwd")),
    ):
        pass


def test_a_package_that_was_cut(disk: bytes, tmp_path: Path) -> None:
    path = ova(tmp_path, parts(disk))
    os.truncate(path, 8192)
    with pytest.raises(ImageError, match="truncated"), package.opened(path):
        pass
    with pytest.raises(NotFound), package.opened(tmp_path / "none.ova"):
        pass
    with pytest.raises(InvalidSpec, match="no package"), package.opened(tmp_path / "none.vmdk"):
        pass


def test_an_envelope_with_its_files_beside_it(vmm: VMM, disk: bytes, tmp_path: Path) -> None:
    members = parts(disk)
    for name, data in [*members, manifest(members)]:
        (tmp_path / name).write_bytes(data)
    assert [one.name for one in vmm.disks.import_package(tmp_path / "a.ovf").disks] == ["a"]
    with pytest.raises(InvalidSpec, match="a package"):
        vmm.disks.import_(tmp_path / "a.ovf")
    (tmp_path / "a-disk1.vmdk").rename(tmp_path / "b")
    with pytest.raises(ImageError, match="not there"):
        vmm.disks.import_package(tmp_path / "a.ovf", "b")
    (tmp_path / "a-disk1.vmdk").symlink_to("b")
    with pytest.raises(ImageError, match="cannot be read"):
        vmm.disks.import_package(tmp_path / "a.ovf", "b")
    (tmp_path / "a-disk1.vmdk").unlink()
    os.mkfifo(tmp_path / "a-disk1.vmdk")
    with pytest.raises(ImageError, match="not a plain file"):
        vmm.disks.import_package(tmp_path / "a.ovf", "b")


@pytest.mark.parametrize("suffix", ["ova", "ovf"])
def test_what_goes_out_comes_in_again(vmm: VMM, tmp_path: Path, suffix: str) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(SIZE))
    vmm.disks.import_(raw, "data")
    target = tmp_path / f"out.{suffix}"
    for _ in range(2):  # the second replaces the first
        assert vmm.disks.export("data", target, cpus=3, memory="300M").size == SIZE
    found = vmm.disks.import_package(target, "again")
    assert found.wishes == {"cpus": 3, "memory": 300 * MIB, "network": "none"} and found.left_out == ()
    vmm.disks.export("again", tmp_path / "back", "raw")
    assert (tmp_path / "back").read_bytes() == raw.read_bytes()
    names = {"out.ova"} if suffix == "ova" else {"out.ovf", "out.mf", "out-disk1.vmdk"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "raw", "back", *names}
    if suffix == "ova":
        with tarfile.open(target) as tar:
            assert tar.getnames() == ["out.ovf", "out.mf", "out-disk1.vmdk"]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_bytes_break_a_package(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is written over a good tar: a package, or one of our errors."""
    folder = tmp_path_factory.getbasetemp()
    members = parts(b"d" * 700)
    path = ova(folder, [members[0], manifest(members), members[1]])
    good = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        block = data.draw(st.sampled_from([0, 512, 6, 7, 8, 9, 10])) * 512
        place = min(block + data.draw(st.integers(0, 511)), len(good) - 1)
        value = data.draw(
            st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"77777777777\0", b"\x80" + bytes(11), b"../x\0"]))
        )
        good[place : place + len(value)] = value
    path.write_bytes(bytes(good[: data.draw(st.one_of(st.none(), st.integers(0, len(good))))]))
    with suppress(TrivisorError), package.opened(path) as opened:
        assert opened.system.cpus > 0
