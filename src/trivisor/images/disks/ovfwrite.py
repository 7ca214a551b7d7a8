"""Writing packages: an envelope that ESXi and VirtualBox read, stream-optimised VMDKs, a manifest of SHA-256, in a tar or side by side.

Elements of an item stand in the order of their schema, which is that of the alphabet (DMTF DSP0243, 8.3).
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trivisor.core.errors import InvalidSpec
from trivisor.core.files import sha256
from trivisor.core.units import MIB
from trivisor.images.disks import ovf
from trivisor.images.disks.catalog import aside
from trivisor.images.disks.ovf import OVF, RASD, VSSD, Card
from trivisor.store.faults import translated

_CHUNK = 1 << 20
_VMDK = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_LINUX = 101
"""CIM_OperatingSystem.OsType: Linux, 64 bits."""


@dataclass(frozen=True)
class Disk:
    """A stream-optimised VMDK in a file, of `size` bytes for a machine."""

    path: Path
    size: int


@dataclass(frozen=True)
class Machine:
    """What a package says of its machine. Memory in bytes, in whole MiB at last."""

    name: str
    cpus: int
    memory: int
    cards: tuple[Card, ...] = ()
    system: str = "Linux"


def write(machine: Machine, disks: Iterable[Disk], target: Path) -> None:
    """Write the package to `target`: an .ova, which is replaced once all is written, or an .ovf with its files beside it.

    Raises InvalidSpec, StorageError, AlreadyExists, NotFound.
    """
    target = target.absolute()
    stem = target.stem
    if not ovf.NAME.fullmatch(f"{stem}-disk99.vmdk"):
        raise InvalidSpec(f"a package cannot be called {stem!r}", hint="letters, digits, and . _ - in between")
    files = {f"{stem}-disk{number}.vmdk": disk for number, disk in enumerate(disks, 1)}
    envelope = render(machine, {name: (disk.path.stat().st_size, disk.size) for name, disk in files.items()}).encode()
    manifest = [f"SHA256({stem}.ovf)= {hashlib.sha256(envelope).hexdigest()}\n"]
    manifest += [f"SHA256({name})= {_digest(disk.path)}\n" for name, disk in files.items()]
    texts = {f"{stem}.ovf": envelope, f"{stem}.mf": "".join(manifest).encode()}
    if target.suffix.lower() == ".ova":
        with aside(target) as made, translated(target), made.open("xb") as out:
            _tar(out, texts, {name: disk.path for name, disk in files.items()})
            out.flush()
            os.fsync(out.fileno())
        return
    # The envelope comes last: until it is there, there is no package.
    for name, disk in files.items():
        with aside(target.with_name(name)) as made, translated(target), disk.path.open("rb") as source, made.open("xb") as out:
            _copy(source, out)
            os.fsync(out.fileno())
    for name in (f"{stem}.mf", f"{stem}.ovf"):
        with aside(target.with_name(name)) as made, translated(target), made.open("xb") as out:
            out.write(texts[name])
            out.flush()
            os.fsync(out.fileno())


def _tar(out: IO[bytes], texts: dict[str, bytes], files: dict[str, Path]) -> None:
    """Envelope and manifest first, then the disks in the order of the envelope."""
    for name, data in texts.items():
        out.write(_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
    for name, path in files.items():
        size = path.stat().st_size
        out.write(_header(name, size))
        with path.open("rb") as source:
            _copy(source, out)
        out.write(bytes(-size % tarfile.BLOCKSIZE))
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o644, "root", "root"
    # ustar is what every reader knows; it has no numbers for 8 GiB and more, which GNU's has.
    return info.tobuf(tarfile.USTAR_FORMAT if size < 8 << 30 else tarfile.GNU_FORMAT)


def _copy(source: IO[bytes], out: IO[bytes]) -> None:
    while data := source.read(_CHUNK):
        out.write(data)
    out.flush()


def _digest(path: Path) -> str:
    with translated(path):
        return sha256(path)


def render(machine: Machine, files: dict[str, tuple[int, int]]) -> str:
    """Return the envelope. `files`: the name of each disk's file, with the bytes of the file and of the disk."""
    numbered = list(enumerate(files.items(), 1))
    references = [f'    <File ovf:id="file{n}" ovf:href="{_text(name)}" ovf:size="{size}"/>' for n, (name, (size, _)) in numbered]
    disks = [
        f'    <Disk ovf:diskId="vmdisk{n}" ovf:fileRef="file{n}" ovf:capacity="{size}" ovf:format="{_VMDK}"/>'
        for n, (_, (_, size)) in numbered
    ]
    names = dict.fromkeys(card.network for card in machine.cards)
    networks = [f'    <Network ovf:name="{_text(name)}"><Description>{_text(name)}</Description></Network>' for name in names]
    section = ["  <NetworkSection>", "    <Info>Networks</Info>", *networks, "  </NetworkSection>"] if networks else []
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<Envelope xmlns="{OVF}" xmlns:ovf="{OVF}" xmlns:rasd="{RASD}" xmlns:vssd="{VSSD}">',
        *("  <References>", *references, "  </References>"),
        *("  <DiskSection>", "    <Info>Disks</Info>", *disks, "  </DiskSection>"),
        *section,
        f'  <VirtualSystem ovf:id="{_text(machine.name)}">',
        "    <Info>A virtual machine</Info>",
        f"    <Name>{_text(machine.name)}</Name>",
        f'    <OperatingSystemSection ovf:id="{_LINUX}">',
        f"      <Info>The operating system</Info><Description>{_text(machine.system)}</Description>",
        "    </OperatingSystemSection>",
        *_hardware(machine, len(files)),
        "  </VirtualSystem>",
        "</Envelope>",
    ]
    return "\n".join(lines) + "\n"


def _hardware(machine: Machine, disks: int) -> list[str]:
    memory = -(-machine.memory // MIB)
    vssd = {"ElementName": "Virtual hardware", "InstanceID": "0", "VirtualSystemIdentifier": machine.name, "VirtualSystemType": "vmx-10"}
    items: list[dict[str, str]] = [
        {
            "AllocationUnits": "hertz * 10^6",
            "ElementName": f"{machine.cpus} processors",
            "ResourceType": "3",
            "VirtualQuantity": str(machine.cpus),
        },
        {"AllocationUnits": "byte * 2^20", "ElementName": f"{memory} MiB of memory", "ResourceType": "4", "VirtualQuantity": str(memory)},
        {"Address": "0", "ElementName": "SCSI controller", "ResourceSubType": "lsilogic", "ResourceType": "6"},
    ]
    items += [
        {
            "AddressOnParent": str(n),
            "ElementName": f"Disk {n + 1}",
            "HostResource": f"ovf:/disk/vmdisk{n + 1}",
            "Parent": "3",
            "ResourceType": "17",
        }
        for n in range(disks)
    ]
    for number, card in enumerate(machine.cards, 1):
        address = {"Address": card.mac} if card.mac else {}
        item = {"AutomaticAllocation": "true", "Connection": card.network, "ElementName": f"Network card {number}"}
        items.append({**address, **item, "ResourceSubType": "E1000", "ResourceType": "10"})
    lines = ["    <VirtualHardwareSection>", "      <Info>Hardware</Info>", "      <System>"]
    lines += [f"        <vssd:{key}>{_text(value)}</vssd:{key}>" for key, value in vssd.items()] + ["      </System>"]
    for number, known in enumerate(items, 1):
        fields = sorted({**known, "InstanceID": str(number)}.items())
        lines += ["      <Item>", *(f"        <rasd:{key}>{_text(value)}</rasd:{key}>" for key, value in fields), "      </Item>"]
    return [*lines, "    </VirtualHardwareSection>"]


def _text(value: str) -> str:
    """Return what stands for the text in XML, also between quotes."""
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
