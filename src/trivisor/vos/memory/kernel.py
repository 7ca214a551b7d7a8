"""What is known of a guest's kernel from its image: symbols, where structures have what, and the words by which it is known again."""

from __future__ import annotations

import struct

import msgspec

from trivisor.vos.memory import btf, kallsyms

FORM = 1
"""Changes when what is kept of a kernel does."""
_BANNER = "linux_banner"
_TASK = "tasks pid tgid comm mm real_parent cred group_leader"
_WANTED = (
    *(f"task_struct.{name}" for name in _TASK.split()),
    "cred.uid",
    *(f"mm_struct.{name}" for name in ("pgd", "arg_start", "arg_end")),
)


class Kernel(msgspec.Struct, frozen=True):
    """One kernel image. Addresses are as it was linked: a kernel that moves itself (KASLR) is not at them."""

    symbols: dict[str, int]
    offsets: dict[str, int]
    """"structure.member" to bytes; empty for a kernel without BTF."""
    banner: bytes
    """What lies at linux_banner."""


def read(image: bytes) -> Kernel:
    """Return what an uncompressed vmlinux says of itself. Raises kallsyms.NoSymbols, btf.NoTypes."""
    if image[:5] != b"\x7fELF\x02" or len(image) < 64:
        raise kallsyms.NoSymbols("it is no 64-bit vmlinux")
    symbols = kallsyms.read(image)
    try:
        banner = _at(image, symbols.get(_BANNER, 0), 256).split(b"\0")[0]
        types = _section(image, b".BTF")
    except (struct.error, IndexError) as error:
        raise kallsyms.NoSymbols("it is cut short") from error
    return Kernel(symbols, btf.Types(types).offsets(_WANTED) if types else {}, banner)


def _section(image: bytes, name: bytes) -> bytes:
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + number * size) for number in range(count)]
    texts = headers[names][4] if names < count else 0
    for header in headers:
        at = texts + header[0]
        if image[at : at + len(name) + 1] == name + b"\0":
            return image[header[4] : header[4] + header[5]]
    return b""


def _at(image: bytes, address: int, size: int) -> bytes:
    """Return what the image has at a virtual address."""
    (table,) = struct.unpack_from("<Q", image, 32)
    each, count = struct.unpack_from("<HH", image, 54)
    for number in range(count):
        kind, _, offset, virtual, _, length = struct.unpack_from("<IIQQQQ", image, table + number * each)
        if kind == 1 and virtual <= address < virtual + length:
            begin = offset + address - virtual
            return image[begin : begin + size]
    return b""
