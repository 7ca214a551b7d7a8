"""The initramfs: tvinit as /init and the few modules that the machine needs, as an uncompressed newc archive.

Uncompressed, because under TCG the guest would pay for unpacking; written here, because the format
(Documentation/driver-api/early-userspace/buffer-format.rst) is simpler than depending on cpio. Nothing of the
host goes in but the given bytes: owners are 0, times are 0, so equal input gives equal bytes and an equal ice.
"""

from __future__ import annotations

from collections.abc import Iterable

_FOLDERS = ("dev", "modules")


def build(init: bytes, modules: Iterable[tuple[str, bytes]], more: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """Return the archive. `modules` are (name, .ko bytes) in the order in which they must be loaded; `more` are loaded when asked for."""
    out = bytearray()
    number = 1
    order: list[str] = []
    for folder in _FOLDERS:
        out += _entry(number, folder, 0o040755, b"")
        number += 1
    # The kernel opens /dev/console for init's stdio before init can mount a devtmpfs.
    out += _entry(number, "dev/console", 0o020600, b"", device=(5, 1))
    number += 1
    for name, data in modules:
        out += _entry(number, f"modules/{name}.ko", 0o100644, data)
        order.append(name)
        number += 1
    for name, data in more:
        out += _entry(number, f"modules/{name}.ko", 0o100644, data)
        number += 1
    out += _entry(number, "modules/order", 0o100644, "".join(f"{name}\n" for name in order).encode())
    out += _entry(number + 1, "init", 0o100755, init)
    out += _entry(0, "TRAILER!!!", 0, b"")
    return bytes(out) + bytes(-len(out) % 512)


def _entry(number: int, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if mode & 0o170000 == 0o040000 else 1
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    head += bytes(-len(head) % 4)
    return head + data + bytes(-len(data) % 4)
