"""Kernels taken apart: each compression, each damage, modules in order, the initramfs."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trivisor.core.errors import InvalidSpec
from trivisor.vmm.engines.vm import initramfs, kernel, kit, modules

RELEASE = "6.1.0-9-test"


def vmlinux(*, pvh: bool = True) -> bytes:
    """The smallest file that passes for a kernel with a PVH entry."""
    note = struct.pack("<III", 4, 8, 18 if pvh else 17) + b"Xen\0" + struct.pack("<Q", 0x1000000)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return head + program + note + f"Linux version {RELEASE} (who@where) ".encode() + bytes(range(256)) * 64


def bzimage(payload: bytes, *, protocol: int = 0x20F) -> bytes:
    """A boot sector and set-up as Documentation/x86/boot.rst has them, around `payload`."""
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x300 - 0x200)
    struct.pack_into("<II", setup, 0x248, 16, len(payload))
    setup[0x300 : 0x300 + 40] = f"{RELEASE} (who@where) #1".encode().ljust(40, b"\0")
    return bytes(setup) + bytes(16) + payload


def lz4_legacy(data: bytes) -> bytes:
    """The kernel's lz4, without any matches: legal, if not small."""
    size = len(data)
    token = bytes([min(size, 15) << 4])
    more = bytearray()
    if size >= 15:
        left = size - 15
        more += b"\xff" * (left // 255) + bytes([left % 255])
    block = token + bytes(more) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


PACKERS = {
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32),
    "gzip": gzip.compress,
    "zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    "lz4": lz4_legacy,
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "none": lambda data: data,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_payload_of_a_bzimage(packer: str) -> None:
    payload = PACKERS[packer](vmlinux())
    if packer not in ("gzip", "none"):
        payload += struct.pack("<I", len(vmlinux()))
    parsed = kernel.parse(bzimage(payload), "vmlinuz")
    assert (parsed.image, parsed.pvh, parsed.release) == (vmlinux(), True, RELEASE)


def test_without_pvh_the_bzimage_is_booted() -> None:
    image = bzimage(gzip.compress(vmlinux(pvh=False)))
    assert kernel.parse(image, "vmlinuz") == kernel.Kernel(image, False, RELEASE)
    with pytest.raises(InvalidSpec, match="no PVH entry"):
        kernel.parse(vmlinux(pvh=False), "vmlinux")


def test_vmlinux_as_it_is() -> None:
    assert kernel.parse(vmlinux(), "vmlinux") == kernel.Kernel(vmlinux(), True, RELEASE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"#!/bin/sh\n",
        bytes(4096),
        b"\x7fELF" + bytes(100),
        bzimage(b"nothing that is known"),
        bzimage(gzip.compress(vmlinux()))[:3000],
        bzimage(lzma.compress(vmlinux())[:60]),
        bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 3) + b"\x0f\xff\xff"),
    ],
    ids=["empty", "script", "zeros", "bare-elf", "unknown", "short", "cut-xz", "bad-lz4"],
)
def test_not_a_kernel(data: bytes) -> None:
    with pytest.raises(InvalidSpec):
        kernel.parse(data, "vmlinuz")


@given(st.binary(max_size=2000))
def test_any_bytes_are_refused_clearly(data: bytes) -> None:
    with pytest.raises(InvalidSpec):
        kernel.parse(bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", len(data)) + data), "vmlinuz")


def test_lz4_matches() -> None:
    # "abc", then 10 bytes from 3 back, then "x": a match that overlaps what it makes.
    assert kernel.lz4_block(b"\x36abc\x03\x00\x10x") == b"abcabcabcabcax"
    with pytest.raises(ValueError, match="before the start"):
        kernel.lz4_block(b"\x10a\x05\x00\x00")


def test_kernel_names() -> None:
    kit.check("micro")
    kit.check("full")
    with pytest.raises(InvalidSpec, match="no kernel 'tiny'"):
        kit.check("tiny")
    with pytest.raises(InvalidSpec, match="not a file"):
        kit.check("/no/such/kernel")
    with pytest.raises(InvalidSpec, match="not a Linux kernel"):
        kit.check("/etc/passwd")


def ko(**info: str) -> bytes:
    return b"\x7fELF\0" + b"".join(f"{key}={value}".encode() + b"\0" for key, value in info.items())


def test_modules_in_load_order(tmp_path: Path) -> None:
    tree = tmp_path / "lib" / RELEASE
    (tree / "kernel/fs").mkdir(parents=True)
    contents = {
        "ext4": ko(license="GPL", depends="jbd2,mb-cache", softdep="pre: crc32c"),
        "jbd2": ko(depends=""),
        "mb-cache": ko(depends=""),
    }
    (tree / "kernel/fs/ext4.ko.xz").write_bytes(lzma.compress(contents["ext4"]))
    (tree / "kernel/fs/jbd2.ko.zst").write_bytes(zstandard.ZstdCompressor().compress(contents["jbd2"]))
    (tree / "kernel/fs/mb-cache.ko").write_bytes(contents["mb-cache"])
    (tree / "modules.builtin").write_text("kernel/fs/squashfs/squashfs.ko\n")
    order = modules.load_order(tree, ("squashfs", "ext4"))
    assert order == [("jbd2", contents["jbd2"]), ("mb_cache", contents["mb-cache"]), ("ext4", contents["ext4"])]
    with pytest.raises(InvalidSpec, match="no module overlay"):
        modules.load_order(tree, ("overlay",))


def test_initramfs_is_what_cpio_reads(tmp_path: Path) -> None:
    loaded = [("virtio", b"one"), ("ext4", b"four!")]
    data = initramfs.build(b"\x7fELF-init", loaded)
    assert data == initramfs.build(b"\x7fELF-init", loaded)
    cpio = shutil.which("cpio")
    if cpio is None:
        pytest.skip("needs cpio")
    subprocess.run([cpio, "-idm", "--quiet", "--no-preserve-owner", "init", "modules/*"], input=data, cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "init").read_bytes() == b"\x7fELF-init"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "modules/order").read_text() == "virtio\next4\n"
    assert (tmp_path / "modules/ext4.ko").read_bytes() == b"four!"
