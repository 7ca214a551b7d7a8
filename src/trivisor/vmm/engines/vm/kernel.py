"""A guest kernel file, made ready for the fastest way in.

QEMU enters an uncompressed vmlinux directly through its PVH note; a bzImage first decompresses itself, which
under TCG takes most of a second. So the payload of a bzImage is taken out (Documentation/x86/boot.rst: the
protocol from 2.08 on gives its offset at 0x248 and its length at 0x24c) and decompressed here, once. A kernel
without a PVH note is booted from its bzImage.
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

from trivisor.core.errors import InvalidSpec

MAX_VMLINUX = 1 << 30
_HINT = "give an x86-64 bzImage (vmlinuz) or an uncompressed vmlinux"


@dataclass(frozen=True)
class Kernel:
    """`image` is what QEMU boots: the vmlinux if `pvh`, else the bzImage. `release` is `uname -r`."""

    image: bytes
    pvh: bool
    release: str


def parse(data: bytes, name: str) -> Kernel:
    """Return the Kernel in `data`; `name` is for messages. Raises InvalidSpec for what is not a kernel."""
    if data[:4] == b"\x7fELF":
        if not _has_pvh(data):
            raise InvalidSpec(f"kernel {name} has no PVH entry", hint="give its bzImage, or build it with CONFIG_PVH")
        return Kernel(data, True, _release_of_vmlinux(data, name))
    if len(data) < 0x250 or data[0x202:0x206] != b"HdrS":
        raise InvalidSpec(f"{name} is not a Linux kernel", hint=_HINT)
    release = _release_of_bzimage(data, name)
    try:
        vmlinux = _payload(data)
        pvh = _has_pvh(vmlinux)
    except (ValueError, EOFError, struct.error, lzma.LZMAError, zlib.error, OSError, zstandard.ZstdError, IndexError) as error:
        raise InvalidSpec(f"kernel {name} is damaged: {error}", hint=_HINT) from error
    return Kernel(vmlinux if pvh else data, pvh, release)


def _payload(data: bytes) -> bytes:
    (protocol,) = struct.unpack_from("<H", data, 0x206)
    if protocol < 0x208:
        return data
    setup = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup + 1) * 512 + offset
    packed = data[start : start + length]
    if not length or len(packed) != length:
        raise ValueError("it is cut short")
    for magic, unpack in _UNPACK:
        if packed.startswith(magic):
            vmlinux = unpack(packed)
            if vmlinux[:5] != b"\x7fELF\x02":
                raise ValueError("what it unpacks to is not a 64-bit kernel")
            return vmlinux
    raise ValueError("its compression is unknown")


def _xz(data: bytes) -> bytes:
    # 4 bytes of size follow the stream: unused_data of the decompressor.
    return lzma.LZMADecompressor().decompress(data, MAX_VMLINUX)


def _gzip(data: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(data, MAX_VMLINUX)


def _bzip2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, MAX_VMLINUX)


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor(max_window_size=1 << 30).decompressobj().decompress(data)


def _lz4(data: bytes) -> bytes:
    """lz4's legacy frames: magic, then blocks of u32 length, until something is not a block (the size at the end)."""
    out = bytearray()
    at = 4
    while at + 4 < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size == 0x184C2102:
            continue
        out += lz4_block(data[at : at + size])
        at += size
    return bytes(out)


def lz4_block(block: bytes) -> bytes:
    """Return one decompressed LZ4 block (lz4_Block_format.md). Raises ValueError or IndexError for a damaged one."""
    out = bytearray()
    at = 0
    while at < len(block):
        token = block[at]
        at += 1
        literals, at = _lz4_length(block, at, token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            break
        distance = block[at] | block[at + 1] << 8
        count, at = _lz4_length(block, at + 2, token & 15)
        count += 4
        if not 0 < distance <= len(out):
            raise ValueError("an lz4 match points before the start")
        piece = out[-distance:] if count > distance else out[-distance : len(out) - distance + count]
        out += (piece * (count // distance + 1))[:count] if count > distance else piece
        if len(out) > MAX_VMLINUX:
            raise ValueError("it grows without end")
    return bytes(out)


def _lz4_length(block: bytes, at: int, length: int) -> tuple[int, int]:
    if length == 15:
        while True:
            more = block[at]
            at += 1
            length += more
            if more != 255:
                break
    return length, at


_UNPACK: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\xfd7zXZ\0", _xz),
    (b"\x1f\x8b", _gzip),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4),
    (b"BZh", _bzip2),
    (b"\x5d\0\0", lambda data: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data, MAX_VMLINUX)),
    (b"\x7fELF", lambda data: data),
)


def _has_pvh(vmlinux: bytes) -> bool:
    """Whether an x86-64 ELF has the Xen note of type 18 (PHYS32_ENTRY), which QEMU looks for."""
    if vmlinux[:5] != b"\x7fELF\x02":
        return False
    machine = struct.unpack_from("<H", vmlinux, 18)[0]
    offset = struct.unpack_from("<Q", vmlinux, 32)[0]
    size, count = struct.unpack_from("<HH", vmlinux, 54)
    if machine != 62:
        return False
    for index in range(count):
        kind, _flags, start, _vaddr, _paddr, length = struct.unpack_from("<IIQQQQ", vmlinux, offset + index * size)
        if kind == 4 and struct.pack("<III", 4, 8, 18) + b"Xen\0" in vmlinux[start : start + length]:
            return True
        if kind == 4 and struct.pack("<III", 4, 4, 18) + b"Xen\0" in vmlinux[start : start + length]:
            return True
    return False


def _release_of_bzimage(data: bytes, name: str) -> str:
    (pointer,) = struct.unpack_from("<H", data, 0x20E)
    text = data[pointer + 0x200 : pointer + 0x280].split(b"\0")[0] if pointer else b""
    return _release(text, name)


def _release_of_vmlinux(data: bytes, name: str) -> str:
    match = re.search(rb"Linux version ([\w.+~-]{1,64}) ", data)
    return _release(match[1] if match else b"", name)


def _release(text: bytes, name: str) -> str:
    word = text.split(b" ")[0].decode("ascii", "replace")
    if not re.fullmatch(r"[0-9][\w.+~-]{1,63}", word):
        raise InvalidSpec(f"{name} is not a Linux kernel: it names no release", hint=_HINT)
    return word
