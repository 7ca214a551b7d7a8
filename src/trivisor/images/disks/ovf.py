"""The envelope of a package: which machine it is of, its hardware and its disks (DMTF DSP0243, Open Virtualization Format 1.1).

What the envelope requires and is not known here is refused by name: a section, or an element in one, is required unless it says
ovf:required="false". Packages of several machines, with disks in other places, in parts, or over parents are refused too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from trivisor.core.errors import ImageError
from trivisor.core.units import GIB, KIB, MIB, TIB
from trivisor.images.disks import xmltree
from trivisor.images.disks.xmltree import Element

OVF = "http://schemas.dmtf.org/ovf/envelope/1"
RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
MAX_DISKS = 64
MAX_CARDS = 32
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()\[\]@,-]{0,199}")
"""Of a file in a package: no folders, nothing hidden."""
CPU, MEMORY, CARD, DISK = 3, 4, 10, 17
_SILENT = {5, 6, 7, 8, 9, 13, 14, 15, 16, 18, 19, 20, 23, 24, 35}
"""Controllers, drives for media, graphics, sound, USB: what a machine here has in its own way, or has not."""
_TOLD = ("AnnotationSection", "EulaSection", "ProductSection", "OperatingSystemSection", "StartupSection", "ResourceAllocationSection")
"""Sections that say nothing of disks and hardware."""
_UNITS = {"": 1, "byte": 1, "bytes": 1, "kilobytes": KIB, "megabytes": MIB, "gigabytes": GIB, "kb": KIB, "mb": MIB, "gb": GIB}
_POWER = re.compile(r"byte(?:s)?\s*\*\s*(2|10)\s*\^\s*(\d{1,2})")


@dataclass(frozen=True)
class Card:
    """A network card: the network that it is on, as the package calls it, and its address if it is to have one."""

    network: str
    mac: str = ""


@dataclass(frozen=True)
class File:
    """A file of a package. `size` in bytes as it lies there, -1 if it is not said."""

    name: str
    size: int = -1
    gzip: bool = False
    """Whether it is packed."""


@dataclass(frozen=True)
class DiskEntry:
    """One disk: the file that holds it (None: an empty disk), and its size as a machine sees it, in bytes."""

    file: str | None
    capacity: int


@dataclass(frozen=True)
class System:
    """The machine that a package is of. Memory in bytes."""

    name: str
    cpus: int
    memory: int
    disks: tuple[DiskEntry, ...]
    cards: tuple[Card, ...]
    files: tuple[File, ...]
    """All files of the package, in their order."""
    system: str = ""
    """The operating system, in words."""
    left_out: tuple[str, ...] = ()
    """Sections and devices that it may do without, and that were not taken."""


def read(data: bytes, what: str) -> System:
    """Return what the envelope says. `what` begins each message. Raises ImageError."""
    return _Reader(xmltree.parse(data, what), what).system()


def _ovf(name: str) -> str:
    return f"{OVF} {name}"


def _rasd(name: str) -> str:
    return f"{RASD} {name}"


class _Reader:
    def __init__(self, root: Element, what: str) -> None:
        self._root, self._what = root, what
        self._left_out: list[str] = []

    def system(self) -> System:
        if self._root.name != _ovf("Envelope"):
            kind = self._root.name.rpartition(" ")[0]
            said = "a package of another version" if "ovf/envelope" in kind or "schema/ovf" in kind else "no package"
            raise self._bad(f"{said} ({self._root.name[:200]})", "OVF 1 is read")
        self._required(self._root, ("References", "DiskSection", "NetworkSection", "VirtualSystem", "Strings"))
        systems = list(self._root.all(_ovf("VirtualSystem")))
        if len(systems) != 1:
            raise self._bad("it has no machine" if not systems else "it is of several machines", "export each machine by itself")
        files = self._files()
        disks = self._disks(files)
        networks = {one.get(_ovf("name")) for section in self._root.all(_ovf("NetworkSection")) for one in section.all(_ovf("Network"))}
        return self._machine(systems[0], files, disks, networks)

    def _machine(self, system: Element, files: dict[str, File], disks: dict[str, DiskEntry], networks: set[str]) -> System:
        self._required(system, ("Info", "Name", "VirtualHardwareSection"))
        hardware = next(system.all(_ovf("VirtualHardwareSection")), None)
        if hardware is None:
            raise self._bad("its machine has no hardware")
        self._required(hardware, ("Info", "System", "Item"))
        cpus = memory = 0
        found: list[DiskEntry] = []
        cards: list[Card] = []
        for item in self._items(hardware):
            self._required(item, (), RASD)
            kind = self._number(item.value(_rasd("ResourceType")), "a resource's type")
            if kind == CPU:
                cpus += self._number(item.value(_rasd("VirtualQuantity")), "the number of processors")
            elif kind == MEMORY:
                units = self._units(item.value(_rasd("AllocationUnits")))
                memory += self._number(item.value(_rasd("VirtualQuantity")), "the memory") * units
            elif kind == DISK:
                found.append(self._attached(item, disks))
            elif kind == CARD:
                cards.append(self._card(item, networks))
            elif kind not in _SILENT:
                self._left_out.append(f"a device of type {kind}")
        if not 1 <= cpus <= 4096 or not 0 < memory <= TIB << 6:
            raise self._bad(f"a machine with {cpus} processors and {memory} bytes of memory")
        if len(found) > MAX_DISKS or len(cards) > MAX_CARDS:
            raise self._bad("it has too many disks or network cards")
        name = system.value(_ovf("Name")) or system.get(_ovf("id"))
        words = next((one.value(_ovf("Description")) for one in system.all(_ovf("OperatingSystemSection"))), "")
        return System(name[:200], cpus, memory, tuple(found), tuple(cards), tuple(files.values()), words[:200], tuple(self._left_out))

    def _items(self, hardware: Element) -> Iterator[Element]:
        """Return the items that hold for every deployment: those of a configuration, and bounds of others, do not."""
        for item in hardware.all(_ovf("Item")):
            if not item.get(_ovf("configuration")) and not item.get(_ovf("bound")):
                yield item

    def _files(self) -> dict[str, File]:
        files: dict[str, File] = {}
        names: set[str] = set()
        for references in self._root.all(_ovf("References")):
            for one in references.all(_ovf("File")):
                key, href = one.get(_ovf("id")), one.get(_ovf("href"))
                name = href.removeprefix("./")
                if not NAME.fullmatch(name):
                    raise self._bad(
                        f"its file {href[:200]!r} is elsewhere, or has no plain name", "a package's files lie beside its envelope"
                    )
                packing = one.get(_ovf("compression"), "identity")
                if packing not in ("", "identity", "gzip"):
                    raise self._bad(f"{name} is packed by {packing[:40]!r}", "have it exported without compression")
                if one.get(_ovf("chunkSize")):
                    raise self._bad(f"{name} is in pieces", "have it exported in one piece")
                if not key or key in files or name in names:
                    raise self._bad(f"two files are called {key or name}"[:200] if key else f"{name} has no id")
                size = one.get(_ovf("size"))
                names.add(name)
                files[key] = File(name, self._number(size, f"the size of {name}") if size else -1, packing == "gzip")
        return files

    def _disks(self, files: dict[str, File]) -> dict[str, DiskEntry]:
        disks: dict[str, DiskEntry] = {}
        for section in self._root.all(_ovf("DiskSection")):
            for one in section.all(_ovf("Disk")):
                key, reference = one.get(_ovf("diskId")), one.get(_ovf("fileRef"))
                if one.get(_ovf("parentRef")):
                    raise self._bad(f"disk {key[:100]!r} has a parent", "have it exported whole (clone, flatten)")
                if reference and reference not in files:
                    raise self._bad(f"disk {key[:100]!r} is in a file {reference[:100]!r} that the package does not have")
                if not key or key in disks:
                    raise self._bad("a disk has no id" if not key else f"two disks are called {key[:100]!r}")
                size = self._number(one.get(_ovf("capacity")), "a disk's size") * self._units(one.get(_ovf("capacityAllocationUnits")))
                disks[key] = DiskEntry(files[reference].name if reference else None, size)
        return disks

    def _attached(self, item: Element, disks: dict[str, DiskEntry]) -> DiskEntry:
        resource = item.value(_rasd("HostResource"))
        found = re.fullmatch(r"(?:ovf:)?/disk/(.{1,200})", resource)
        if found is None or found[1] not in disks:
            raise self._bad(f"its machine has a disk {resource[:200]!r} that the package does not have")
        return disks[found[1]]

    def _card(self, item: Element, networks: set[str]) -> Card:
        network = item.value(_rasd("Connection"))
        if network and network not in networks:
            raise self._bad(f"a network card is on {network[:100]!r}, which the package does not have")
        return Card(network[:200], item.value(_rasd("Address"))[:40])

    def _required(self, element: Element, known: tuple[str, ...], whole: str = "") -> None:
        """Refuse what the element holds, is required and is not known; note what else is not. All of the namespace `whole` is known."""
        for child in element.children:
            space, _, name = child.name.rpartition(" ")
            if space == whole or (space == OVF and (name in known or name in _TOLD)):
                continue
            if space == OVF and name == "VirtualSystemCollection":
                raise self._bad("it is of several machines", "export each machine by itself")
            said = name if space == OVF else f"{name} ({space})"
            if child.get(_ovf("required"), "true").strip() not in ("false", "0"):
                raise self._bad(
                    f"it requires {said[:200]}, which is not known here", 'have it exported without, or mark it ovf:required="false"'
                )
            if said not in self._left_out:
                self._left_out.append(said[:200])

    def _number(self, text: str, what: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 19:
            raise self._bad(f"{what} is no number: {text[:60]!r}")
        return int(text)

    def _units(self, text: str) -> int:
        words = " ".join(text.lower().split())
        if words in _UNITS:
            return _UNITS[words]
        found = _POWER.fullmatch(words)
        if found is None or int(found[2]) > 60:
            raise self._bad(f"{text[:60]!r} is no unit of bytes")
        return int(int(found[1]) ** int(found[2]))

    def _bad(self, why: str, hint: str = "") -> ImageError:
        return ImageError(f"{self._what}: {why}", hint=hint)
