"""Which kernel modules a machine needs, and in which order they load.

Kernels differ in what is built in, and a package that was only unpacked has no modules.dep (its postinst makes
that), so dependencies are read from the modules themselves: `depends=` and `softdep=` in .modinfo.
"""

from __future__ import annotations

import gzip
import lzma
import re
from pathlib import Path

import zstandard

from trivisor.core.errors import InvalidSpec

BOOT = ("virtio_pci", "virtio_console", "virtio_rng")
"""What brings up the line. crc32c first: ext4's checksums ask for it by an alias that only modprobe resolves."""
DISKS = ("virtio_blk", "squashfs", "overlay", "crc32c_generic", "ext4")
NETWORK = ("virtio_net",)
WANTED = BOOT + DISKS + NETWORK
SHARES = ("virtiofs", "9pnet_virtio", "9p")
"""Loaded only in machines that share folders with the host; cloud kernels have no 9p."""
DEVICES = {
    "nvme": ("nvme",),
    "usb": ("xhci_pci", "usbhid", "hid_generic", "usb_storage", "sd_mod", "cdc_acm", "evdev"),
    "watchdog": ("i6300esb",),
    "memory": ("virtio_mem",),
    "balloon": ("virtio_balloon",),
}
"""Loaded when a machine is given such a device; cloud kernels have only the last two of these."""
OPTIONAL = frozenset({"virtio_rng", "crc32c_generic", *SHARES}.union(*DEVICES.values()))
NO_STICK = frozenset({"hid", "usbhid", "hid_generic", "cdc_acm", "evdev"})
"""What of USB's a stick needs not: under TCG loading takes half a second."""
PARAMETERS = {"usb_storage": "delay_use=0", "usbcore": "old_scheme_first=1"}
"""A stick is given a second to settle, and each device a second reset, which ours do not need."""


def load_order(tree: Path, wanted: tuple[str, ...] = WANTED) -> list[tuple[str, bytes]]:
    """Return (name, .ko bytes) in load order for `tree` (/lib/modules/RELEASE). Built-in ones are left out.

    Raises InvalidSpec for one that is neither there nor built in.
    """
    files = {_name(path): path for path in sorted(tree.rglob("*.ko*"))}
    builtin = _builtin(tree)
    done: dict[str, bytes] = {}

    def visit(name: str, needed: bool) -> None:
        if name in done or name in builtin:
            return
        path = files.get(name)
        if path is None:
            if needed:
                raise InvalidSpec(f"kernel {tree.name} has no module {name}", hint="build it with virtio, squashfs, overlayfs and ext4")
            return
        data = _read(path)
        info = modinfo(data)
        for soft in re.findall(r"pre: ([^:]*?)(?= post:|$)", " ".join(info.get("softdep", []))):
            for word in soft.split():
                visit(_canonical(word), False)
        for word in ",".join(info.get("depends", [])).split(","):
            if word:
                visit(_canonical(word), True)
        done[name] = data

    for name in wanted:
        visit(name, name not in OPTIONAL)
    return list(done.items())


def modinfo(data: bytes) -> dict[str, list[str]]:
    """Return the keys of a module's .modinfo that say what it depends on."""
    found: dict[str, list[str]] = {}
    for match in re.finditer(rb"\0(depends|softdep)=([^\0]*)\0", data.replace(b"\0", b"\0\0")):
        found.setdefault(match[1].decode(), []).append(match[2].decode("ascii", "replace"))
    return found


def _builtin(tree: Path) -> frozenset[str]:
    try:
        text = (tree / "modules.builtin").read_text()
    except FileNotFoundError:
        return frozenset()
    return frozenset(_name(Path(line)) for line in text.split())


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _name(path: Path) -> str:
    return _canonical(path.name.partition(".ko")[0])


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data
