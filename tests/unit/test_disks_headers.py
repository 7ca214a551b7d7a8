"""What headers of disk images say: made by hand, so that each of their lies is told on its own."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import TrivisorError
from trivisor.images.disks.formats import FORMATS, Format
from trivisor.images.disks.headers import Header, read

SIZE = 1 << 30


def put(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    out = bytearray(data)
    for place, value in changes:
        out[place : place + len(value)] = value
    return bytes(out)


def qcow2(*changes: tuple[int, bytes], version: int = 3) -> bytes:
    return put(struct.pack(">4sIQIIQII", b"QFI\xfb", version, 0, 0, 16, SIZE, 0, 1).ljust(4096, b"\0"), *changes)


DESCRIPTION = (
    b'# Disk DescriptorFile\nversion=1\nCID=123a\nparentCID=ffffffff\ncreateType="monolithicSparse"\nRW 2097152 SPARSE "disk.vmdk"\n'
)


def vmdk(*changes: tuple[int, bytes], text: bytes = DESCRIPTION, magic: bytes = b"KDMV") -> bytes:
    head = struct.pack("<4sIIQQQQIQQQ", magic, 1, 3, SIZE // 512, 128, 1, 20, 512, 21, 30, 128)
    return put(head.ljust(1 << 16, b"\0"), (512, text), *changes)


def vhd_footer(kind: int) -> bytes:
    return put(b"conectix".ljust(512, b"\0"), (48, struct.pack(">Q", SIZE)), (60, struct.pack(">I", kind)))


def vhd(kind: int = 3, tail: int | None = None) -> bytes:
    return (vhd_footer(kind) if kind != 2 else bytes(512)) + bytes(4096) + vhd_footer(kind if tail is None else tail)


def vdi(*changes: tuple[int, bytes]) -> bytes:
    head = put(bytes(4096), (64, struct.pack("<IIII", 0xBEDA107F, 0x10001, 400, 1)), (0x170, struct.pack("<Q", SIZE)))
    return put(head, (0x158, struct.pack("<I", 2048)), (0x178, struct.pack("<IIII", 1 << 20, 0, 1024, 0)), *changes)


def region(name: str, place: int, needed: int = 1) -> bytes:
    return UUID(name).bytes_le + struct.pack("<QII", place, 1 << 20, needed)


METADATA = "8B7CA206-4790-4B9A-B8FE-575F050F886E"


def vhdx(*changes: tuple[int, bytes], regions: tuple[bytes, ...] = (), parent: int = 0) -> bytes:
    table = [region("2DC27766-F623-4200-9D64-115E9BFD4A08", 3 << 20), region(METADATA, 2 << 20), *regions]
    items = [
        (UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le, struct.pack("<II", 1 << 20, parent)),
        (UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le, struct.pack("<Q", SIZE)),
    ]
    metadata, values = b"metadata" + struct.pack("<HH", 0, len(items)), b""
    metadata = metadata.ljust(32, b"\0")
    for name, value in items:
        metadata += name + struct.pack("<IIII", (64 << 10) + len(values), len(value), 4, 0)
        values += value
    data = b"vhdxfile".ljust(192 << 10, b"\0") + b"regi" + struct.pack("<III", 0, len(table), 0) + b"".join(table)
    data = data.ljust(2 << 20, b"\0") + metadata.ljust(64 << 10, b"\0") + values
    return put(data, *changes)


GOOD: dict[Format, bytes] = {
    "raw": bytes(SIZE >> 20),
    "qcow2": qcow2(),
    "vmdk": vmdk(),
    "vhdx": vhdx(),
    "vhd": vhd(),
    "vdi": vdi(),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_header_says_what_it_is(tmp_path: Path, kind: Format) -> None:
    (tmp_path / "disk").write_bytes(GOOD[kind])
    assert read(tmp_path / "disk") == Header(kind, 1024 if kind == "raw" else SIZE)
    assert read(tmp_path / "disk", kind).format == kind
    assert read(tmp_path / "disk", "raw").format == "raw"


def test_older_and_other_shapes_are_read(tmp_path: Path) -> None:
    for data in (qcow2(version=2)[:72], vhd(2), vmdk(text=b"")):
        (tmp_path / "disk").write_bytes(data)
        assert read(tmp_path / "disk").size == SIZE
    stream = vmdk((56, b"\xff" * 8))
    (tmp_path / "disk").write_bytes(stream + vmdk()[:512] + bytes(512))
    assert read(tmp_path / "disk").size == SIZE


ELSEWHERE = {
    "a backing file": qcow2((8, struct.pack(">QI", 512, 9))),
    "a backing file of no length": qcow2((8, struct.pack(">QI", 512, 0))),
    "data in another file": qcow2((72, struct.pack(">Q", 4))),
    "a description": DESCRIPTION.replace(b"SPARSE", b"FLAT"),
    "an ESX delta": vmdk(magic=b"COWD"),
    "an extent elsewhere": vmdk(text=DESCRIPTION.replace(b"SPARSE", b"FLAT")),
    "two extents": vmdk(text=DESCRIPTION + b'RW 5 SPARSE "other.vmdk"\n'),
    "a parent's content": vmdk(text=DESCRIPTION.replace(b"ffffffff", b"1234abcd")),
    "a parent's name": vmdk(text=DESCRIPTION + b'parentFileNameHint="../other.vmdk"\n'),
    "a parent where readers look": vmdk((28, struct.pack("<QQ", 60, 2)), text=DESCRIPTION + b'parentFileNameHint="/etc/passwd"\n'),
    "nothing but a description": vmdk((12, bytes(8))),
    "a differencing VHD": vhd(4),
    "a differencing VHD by its end": vhd(3, tail=4),
    "a differencing VDI": vdi((76, struct.pack("<I", 4))),
    "a VDI's parent": vdi((0x1B8, b"\x01")),
    "a VHDX's parent": vhdx(parent=2),
}
WRONG = {
    "qcow2 of version 9": qcow2(version=9),
    "qcow2 of nothing": qcow2((24, bytes(8))),
    "encrypted": qcow2((32, struct.pack(">I", 2))),
    "marked as damaged": qcow2((72, struct.pack(">Q", 2))),
    "unknown features": qcow2((72, struct.pack(">Q", 1 << 40))),
    "cut in its header": qcow2()[:40],
    "VMDK of version 9": vmdk((4, struct.pack("<I", 9))),
    "a long description": vmdk((36, struct.pack("<Q", 1 << 40))),
    "a description outside": vmdk((28, struct.pack("<Q", 1 << 50))),
    "a stream without an end": vmdk((56, b"\xff" * 8)),
    "VHD without an end": vhd()[:-512] + bytes(512),
    "VHD of an odd type": vhd(7),
    "VDI of an odd type": vdi((76, struct.pack("<I", 3))),
    "VDI of another version": vdi((68, struct.pack("<I", 0x10002))),
    "VDI without its blocks": vdi((0x184, struct.pack("<I", 7))),
    "VHDX without tables": vhdx((192 << 10, b"none")),
    "VHDX with an unknown region": vhdx(regions=(region("11111111-1111-1111-1111-111111111111", 5 << 20),)),
    "VHDX without metadata": vhdx((2 << 20, b"nothing!")),
    "VHDX with metadata far outside": vhdx(((192 << 10) + 16 + 32 + 16, b"\xff" * 8)),
    "an empty file": b"",
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_leads_elsewhere_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "disk").write_bytes(ELSEWHERE[what])
    with pytest.raises(TrivisorError) as caught:
        read(tmp_path / "disk")
    assert "stand for itself" in caught.value.hint or "exported as one file" in caught.value.hint


@pytest.mark.parametrize("what", WRONG)
def test_what_is_damaged_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "disk").write_bytes(WRONG[what])
    with pytest.raises(TrivisorError):
        read(tmp_path / "disk")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_break_the_parsers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is written over a good header: a size, or one of our errors."""
    kind = data.draw(st.sampled_from(FORMATS))
    places = {"vhdx": [(192 << 10, 200), (2 << 20, 150), (2112 << 10, 16)], "vmdk": [(0, 80), (512, 200)]}.get(kind, [(0, 512)])
    good = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        start, room = data.draw(st.sampled_from(places))
        value = data.draw(st.binary(min_size=1, max_size=16))
        place = min(start + data.draw(st.integers(0, room)), max(0, len(good) - 16))
        good[place : place + len(value)] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(good))))
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(bytes(good[:cut]))
    with suppress(TrivisorError):
        assert read(path, data.draw(st.sampled_from([None, kind]))).size > 0
