"""Memory and vCPUs that a virtual machine gains and gives back while it runs, over QMP.

memory   beyond what QEMU was started with: a virtio-mem device in a spare PCIe root port, over a backend of its own, as large as there is
         room for and of no host memory until the guest has it. The guest takes part: it may give back less than is asked.
vCPUs    QEMU cannot plug them under TCG. So some are there from the start (`spare_cpus`), and the guest brings them up and down.
balloon  takes from what QEMU was started with; only from RAM that is the machine's own, since a page given up would go out of
         the ice's file, or come back out of it, as the ice had it.

What there is, QEMU is asked. Every wait has a bound, and what was reached by then is what is said.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trivisor.core.errors import EngineError, GuestError, GuestGone, GuestShort, InvalidSpec, StorageError, UnsupportedByWall
from trivisor.core.units import GIB, MIB
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import argv, files, kit, limits, runner
from trivisor.vmm.engines.vm.argv import More
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vos import guest
from trivisor.vos.line import Line

T = TypeVar("T")

MEMORY, BALLOON = argv.GROWTH, "balloon"

BLOCK = argv.GROWTH_BLOCK
ROOM = min(max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // GIB, 1), 256) * GIB
"""What a machine's addresses leave room for: the host's memory, and no more than the processors with the shortest addresses reach."""
_MODULES = 30.0
_LOOK = 0.005
_REST = 0.1
"""Seconds after which a guest that was in the middle of giving up memory has told of it."""


@dataclass(frozen=True)
class Extent:
    """Memory beyond what QEMU was started with. Bytes."""

    physical: int
    """Guest-physical address from which on it lies."""
    size: int
    """What the guest has of it."""
    asked: int
    most: int


@dataclass(frozen=True)
class Sizes:
    """What a running machine has. Bytes."""

    base: int
    """What QEMU was started with."""
    more: Extent | None
    balloon: int
    """What the guest has given up of `base`."""

    @property
    def now(self) -> int:
        return self.base + (self.more.size if self.more else 0) - self.balloon


class Growth:
    """The memory and the vCPUs of one running machine."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def sizes(self) -> Sizes:
        """Return how much memory it has. Raises EngineError."""
        with self._qmp() as qmp:
            return sizes(qmp)

    def cpus(self) -> int:
        """Return how many vCPUs it may have without a restart. Raises EngineError."""
        with self._qmp() as qmp:
            return len(qmp.ask("query-cpus-fast"))

    def room(self) -> int:
        """Return how much memory beyond that of its start it may have, in bytes. Raises GuestGone."""
        return room(self._box)

    def resize(self, size: int, timeout: float) -> None:
        """Have it grow or shrink to `size` bytes, at least what it was started with. Raises GuestError if the guest does not get there."""
        with self._qmp() as qmp:
            found = sizes(qmp)
            wanted = -(-(size - found.base) // BLOCK) * BLOCK
            if found.more is None:
                if not wanted:
                    return
                self._load("memory")
                _plug(qmp, self._box, wanted)
            before = found.more.size if found.more else 0
            self._note(wanted, before)
            path = f"/machine/peripheral/{MEMORY}"
            qmp.ask("qom-set", {"path": path, "property": "requested-size", "value": wanted})
            reached = _settled(lambda: _extent(qmp), lambda extent: extent.size == wanted, timeout)
            if reached.size == wanted:
                return
            if wanted > before:
                # What it did not take it shall not take later, unseen.
                qmp.ask("qom-set", {"path": path, "property": "requested-size", "value": before})
                _settled(lambda: _extent(qmp), lambda extent: extent.size == before, timeout)
                raise self._failed(f"the guest took {reached.size - before} of {wanted - before} bytes of memory in {timeout:g} s")
        has = found.base + reached.size
        raise GuestShort(
            f"the guest gave back {before - reached.size} of {before - wanted} bytes in {timeout:g} s: it has {has}",
            before - reached.size,
            machine=self._box.spec.name,
            hint="what it holds cannot be moved; it goes on trying, and its next start has no more than was asked for",
        )

    def bring_up(self, count: int, timeout: float) -> None:
        """Have the guest run on `count` vCPUs. Raises GuestError if it does not."""
        before = self._box.spec.cpus
        if count > before:
            limits.share(self._box, count)
        try:
            self._configure([("cpus", str(count))], timeout)
        except GuestError:
            limits.share(self._box, before)
            raise
        limits.share(self._box, count)

    def balloon(self, size: int, timeout: float) -> int:
        """Have the guest give up `size` bytes of what it was started with, and return how many it has given up, which may be fewer.

        Raises UnsupportedByWall for RAM that is shared with ice, InvalidSpec for more than there is.
        """
        with self._qmp() as qmp:
            if not own(qmp):
                error = UnsupportedByWall("take memory by a balloon out of RAM that comes from ice", "vm", machine=self._box.spec.name)
                error.hint = 'make the machine with ram="shared"'
                raise error
            base = sizes(qmp).base
            if size >= base:
                raise InvalidSpec(f"a balloon of {size} bytes leaves nothing of {base}", machine=self._box.spec.name)
            if not _there(qmp, BALLOON):
                if not size:
                    return 0
                self._load("balloon")
                qmp.ask("device_add", {"driver": "virtio-balloon-pci", "id": BALLOON, "bus": _port(qmp, self._box), "deflate-on-oom": True})
            qmp.ask("balloon", {"value": base - size})

            def taken() -> int:
                return base - int(qmp.ask("query-balloon")["actual"])

            reached = _settled(taken, lambda has: has == size, timeout)
            if reached != size:
                # It stays as it is; a guest that was still at it comes back to that.
                qmp.ask("balloon", {"value": base - reached})
                time.sleep(_REST)
                reached = _settled(taken, lambda has: has == reached, timeout)
            return reached

    def _load(self, kind: str) -> None:
        """Have the guest load the driver, if its kernel has it apart."""
        found = kit.have(self._box.home, self._box.spec.kernel)
        modules = found.devices.get(kind, ()) if found is not None else ()
        if modules:
            self._configure([("module", *modules)], _MODULES)

    def _configure(self, steps: list[tuple[str, ...]], timeout: float) -> None:
        line = Line.connect(self._box.dir.line, self._box.spec.name)
        try:
            guest.configure(line, steps, timeout=timeout)
        finally:
            line.close()

    def _note(self, size: int, before: int) -> None:
        """Write down how far beyond its start the machine's memory may reach (memory.py looks no further)."""
        if not before or size > reach(self._box):
            remember(self._box, size)

    def _failed(self, what: str) -> GuestError:
        hint = "is it still starting, or its kernel without virtio_mem and ACPI hot-plug? A restart gives it the memory in any case"
        return GuestError(what, machine=self._box.spec.name, hint=hint)

    def _qmp(self) -> Qmp:
        return Qmp.connect(self._box.dir.qmp, self._box.spec.name)


def sizes(qmp: Qmp) -> Sizes:
    """Return how much memory the machine behind `qmp` has. Raises EngineError."""
    base = int(qmp.ask("query-memory-size-summary")["base-memory"])
    balloon = base - int(qmp.ask("query-balloon")["actual"]) if _there(qmp, BALLOON) else 0
    return Sizes(base, _extent(qmp) if _there(qmp, MEMORY) else None, balloon)


def own(qmp: Qmp) -> bool:
    """Whether RAM is of this machine alone: anonymous, or a file that is written through."""
    if qmp.ask("qom-get", {"path": "/objects/ram", "property": "share"}):
        return True
    return str(qmp.ask("qom-get", {"path": "/objects/ram", "property": "type"})) == "memory-backend-ram"


def reach(box: Box) -> int:
    """Return how far beyond its start a machine's memory may reach, in bytes. Raises StorageError."""
    try:
        return int((box.dir.root / "grown").read_text())
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise StorageError(f"{box.dir.root / 'grown'} cannot be read: {error}", machine=box.spec.name, hint="stop and start it") from error


def more(box: Box, qmp: Qmp) -> More | None:
    """Return what a copy must have of what the machine behind `qmp` was given while it ran. Raises EngineError, StorageError."""
    if not _there(qmp, MEMORY):
        return None
    found = _extent(qmp)
    shared = bool(qmp.ask("qom-get", {"path": f"/objects/{MEMORY}-ram", "property": "share"}))
    port = next(
        str(bridge["qdev_id"])
        for bus in qmp.ask("query-pci")
        for bridge in bus["devices"]
        if any(device["qdev_id"] == MEMORY for device in bridge.get("pci_bridge", {}).get("devices", ()))
    )
    return More(found.physical, found.asked, found.most, min(reach(box), found.most), shared, port)


def remember(box: Box, size: int) -> None:
    """Note of a copy how far its memory may reach beyond that of its start. Raises StorageError."""
    try:
        (box.dir.root / "grown").write_text(f"{size}\n")
    except OSError as error:
        raise files.storage(error, "writing the machine's folder") from error


def forget(box: Box) -> None:
    """Before a start: the last life's growth is over."""
    (box.dir.root / "grown").unlink(missing_ok=True)


def _extent(qmp: Qmp) -> Extent:
    for device in qmp.ask("query-memory-devices"):
        data: dict[str, Any] = device["data"]
        if data.get("id") == MEMORY:
            return Extent(int(data["memaddr"]), int(data["size"]), int(data["requested-size"]), int(data["max-size"]))
    raise EngineError("QEMU has lost the machine's further memory")


def room(box: Box) -> int:
    """Return how much memory there is room for beyond what QEMU was started with: no QMP command says it for all versions."""
    pid = runner.engine(box.dir)
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError as error:
        raise GuestGone("its QEMU has ended", machine=box.spec.name) from error
    found = re.search(r"^size=(\d{1,9})M,maxmem=(\d{1,9})M$", "\n".join(words), re.MULTILINE)
    return (int(found[2]) - int(found[1])) * MIB if found else 0


def _plug(qmp: Qmp, box: Box, wanted: int) -> None:
    """Plug a device that can hold all there is room for, at least `wanted` bytes, and holds nothing yet."""
    port, size = _port(qmp, box), room(box)
    # Daemons that share folders map all of a machine's memory.
    mapped = box.spec.volumes or box.spec.ram == "shared"
    kind = {"qom-type": "memory-backend-memfd", "share": True} if mapped else {"qom-type": "memory-backend-ram"}
    while True:
        try:
            qmp.ask("object-add", {**kind, "id": f"{MEMORY}-ram", "size": size, "merge": box.spec.dedupe})
            break
        except EngineError:
            # A host that promises no more memory than it has (vm.overcommit_memory=2) may have less to promise.
            size = size // 2 // BLOCK * BLOCK
            if size < wanted:
                raise
    try:
        device = {"driver": "virtio-mem-pci", "id": MEMORY, "memdev": f"{MEMORY}-ram", "bus": port, "requested-size": 0}
        qmp.ask("device_add", device | {"block-size": BLOCK})
    except EngineError:
        qmp.ask("object-del", {"id": f"{MEMORY}-ram"})
        raise


def _port(qmp: Qmp, box: Box) -> str:
    """Return a root port with nothing in it."""
    for bus in qmp.ask("query-pci"):
        for device in bus["devices"]:
            if device["qdev_id"].startswith("spare") and not device.get("pci_bridge", {}).get("devices"):
                return str(device["qdev_id"])
    raise InvalidSpec("the machine has no free port for what gives it memory", machine=box.spec.name, hint="detach a device first")


def _there(qmp: Qmp, name: str) -> bool:
    return name in {entry["name"] for entry in qmp.ask("qom-list", {"path": "/machine/peripheral"})}


def _settled(look: Callable[[], T], done: Callable[[T], bool], timeout: float) -> T:
    """Look until it is `done`, at most `timeout` seconds, and return what was seen last: QEMU's event comes once a second at most."""
    deadline = time.monotonic() + timeout
    while not done(seen := look()) and time.monotonic() < deadline:
        time.sleep(_LOOK)
    return seen
