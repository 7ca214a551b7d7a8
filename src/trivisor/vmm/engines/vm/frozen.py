"""A machine that was frozen, as a folder: what is in it, what a host needs to run it on, whether it is whole.

    ram           its RAM, a plain sparse file that every copy maps privately and read-only
    more          what it was given beyond that while it ran, in the same way; each copy is given its own
    state         its devices, without RAM, as QEMU's migration writes them
    disk.qcow2    its writable layer at that instant; without backing file
    fresh         a mark that no guest has had that layer yet
    frozen.json   its shape, needs and digests, and a line with a digest of that; written last

Each start notes beside the machine what it was started as ("life"): what is in force then is what a copy of it needs, whatever its spec or
the host's kit become while it runs.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trivisor.core.errors import HostLacks, StorageError
from trivisor.core.files import sha256, sync
from trivisor.core.paths import MachineDir
from trivisor.core.units import MIB
from trivisor.launch import tvinit
from trivisor.launch.net import provide
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import argv, disks, files, ice, kit, pending, qemu
from trivisor.vmm.engines.vm.argv import More, Shape
from trivisor.vmm.engines.vm.ice import Ice
from trivisor.vmm.engines.vm.runner import Setup

_FORMAT = 1
_LIFE, _FACTS = "life", "frozen.json"
RAM, MORE, STATE, DISK, FRESH = "ram", "more", "state", "disk.qcow2", "fresh"
_QUICK = 64 * MIB
_MOST_CPUS, _MOST_ROOM, _MOST_PHYSICAL = 255, 1 << 40, 1 << 52
_REMEDY = {
    "qemu": "install that version, or point TRIVISOR_QEMU to it",
    "processor": "run it on such a processor",
    "kernel": "take the kit of the home where it was frozen along (kits/)",
    "guest": "use the version of trivisor that froze it",
    "root": "have that image here",
    "network": "run as the same kind of user: root has links, others have passt",
}


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine was started as."""

    shape: Shape
    needs: dict[str, str]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """frozen.json. `key` names this freeze and no other; empty digests are of files that are not there."""

    format: int
    key: str
    shape: Shape | None
    """None: without memory."""
    more: More | None = None
    needs: dict[str, str]
    state_digest: str
    disk_digest: str


def needs(setup: Setup, box: Box) -> dict[str, str]:
    """Return what a copy of a machine with this set-up needs."""
    shape = setup.shape
    return {
        "wall": "vm",
        "qemu": setup.qemu.version,
        "processor": argv.TCG_CPU if shape.accel == "tcg" else f"kvm {_processor()}",
        "kernel": f"{setup.kit.release} {setup.kit.digest[:16]}",
        "guest": tvinit.digest()[:16],
        "root": box.rootfs_digest,
        "network": "tap" if shape.tap else "passt" if shape.network else "none",
    }


def differs(box: Box, found: qemu.Qemu, accel: str, wanted: Mapping[str, str]) -> None:
    """Raise HostLacks with the first of `wanted` that this host is not. Makes and changes nothing."""
    have = kit.have(box.home, box.spec.kernel)
    network = "none" if box.spec.network == "none" else "passt" if provide.possible() else "tap"
    here = {
        "wall": "vm",
        "qemu": found.version,
        "processor": argv.TCG_CPU if accel == "tcg" else f"kvm {_processor()}",
        "kernel": f"{have.release} {have.digest[:16]}" if have else "none",
        "guest": tvinit.digest()[:16],
        "root": box.rootfs_digest,
        "network": network,
    }
    for name, value in wanted.items():
        if here.get(name, "") != value:
            raise HostLacks(
                f"it was frozen with {name} {value}, and here is {here.get(name) or 'none'}",
                machine=box.spec.name,
                hint=_REMEDY.get(name, "use the version of trivisor that froze it"),
            )


def note(box: Box, setup: Setup) -> None:
    """Write down what a machine is started as. Raises StorageError."""
    try:
        (box.dir.root / _LIFE).write_bytes(msgspec.json.encode(Life(shape=setup.shape, needs=needs(setup, box))))
    except OSError as error:
        raise files.storage(error, "writing the machine's folder") from error


def life(place: MachineDir, name: str) -> Life:
    """Return what a machine was started as. Raises StorageError."""
    try:
        return msgspec.json.decode((place.root / _LIFE).read_bytes(), type=Life)
    except (OSError, msgspec.DecodeError) as error:
        hint = "stop and start it: another version of trivisor started it"
        raise StorageError("what the machine was started as is not known", machine=name, hint=hint) from error


def begin(shape: Shape | None, needed: dict[str, str], more: More | None = None) -> Facts:
    """Return what is to be known of a machine that is being frozen, without memory if it has no shape."""
    return Facts(format=_FORMAT, key=os.urandom(16).hex(), shape=shape, more=more, needs=needed, state_digest="", disk_digest="")


def finish(folder: Path, facts: Facts, *, lasting: bool) -> None:
    """Make what lies in `folder` a frozen machine. Raises OSError."""
    state, disk = folder / STATE, folder / DISK
    whole = msgspec.structs.replace(
        facts,
        state_digest=sha256(state) if facts.shape is not None else "",
        # A large disk is another matter: whoever keeps it knows each of its files by a digest.
        disk_digest=sha256(disk) if disk.exists() and disk.stat().st_size <= _QUICK else "",
    )
    text = msgspec.json.encode(whole)
    (folder / _FACTS).write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")
    for path in folder.iterdir():
        path.chmod(0o444)
        if lasting:
            sync(path)
    if lasting:
        sync(folder)


def agree(box: Box, shape: Shape, more: More | None = None) -> None:
    """Raise StorageError for a shape that no machine of this spec can have had: what was frozen may come from anybody."""
    linked = box.spec.network != "none"
    tap = linked and not provide.possible()
    right = (
        (shape.memory // MIB == box.spec.memory // MIB if more is None else _bounded(shape.memory, more, box.spec.memory))
        and 1 <= shape.cpus <= shape.cpus + shape.spare_cpus <= _MOST_CPUS
        and 0 <= shape.room <= _MOST_ROOM
        and shape.upper == (box.spec.disk != "ram")
        and (shape.network, shape.tap, shape.shares) == (linked, tap, None)
    )
    if not right:
        raise StorageError("what was frozen is not a machine of this spec", machine=box.spec.name, hint="freeze the machine anew")


def _bounded(base: int, more: More, memory: int) -> bool:
    return (
        re.fullmatch(r"spare[1-9]", more.port) is not None
        and base + max(more.asked, 0) < memory + argv.GROWTH_BLOCK
        and 0 <= more.reach <= more.most <= _MOST_ROOM
        and 0 < more.physical < _MOST_PHYSICAL
    )


def load(folder: Path, machine: str) -> tuple[Ice, Facts]:
    """Return a frozen machine that is whole as far as is quick to see, or is still being written (pending.py). Raises StorageError."""
    if (writing := pending.find(folder)) is not None:
        return _found(folder, writing.facts), writing.facts
    try:
        text, _, said = (folder / _FACTS).read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != said.strip():
            raise _damaged(folder, machine, _FACTS)
        facts = msgspec.json.decode(text, type=Facts)
    except (OSError, msgspec.DecodeError) as error:
        raise _damaged(folder, machine, _FACTS) from error
    if facts.format != _FORMAT:
        raise StorageError("it was frozen by another version of trivisor", machine=machine, hint="use that version")
    found = _found(folder, facts)
    try:
        if facts.state_digest:
            if sha256(found.state) != facts.state_digest:
                raise _damaged(folder, machine, "state")
            if found.ram.stat().st_size != found.facts.memory:
                raise _damaged(folder, machine, "ram")
        if facts.disk_digest and sha256(found.disk) != facts.disk_digest:
            raise _damaged(folder, machine, DISK)
        if found.disk.exists() and not disks.alone(found.disk):
            raise StorageError(f"{found.disk} leads to another file", machine=machine, hint="nothing that was frozen here does: delete it")
    except OSError as error:
        raise _damaged(folder, machine, str(error.filename)) from error
    return found, facts


def _found(folder: Path, facts: Facts) -> Ice:
    memory = facts.shape.memory // MIB * MIB if facts.shape else 0
    return Ice(folder, ice.Facts(format=0, key=facts.key, argv=[], needs={}, memory=memory, state_digest="", disk_digest="", made=0))


def _damaged(folder: Path, machine: str, what: str) -> StorageError:
    return StorageError(f"what was frozen in {folder} is damaged: {what}", machine=machine, hint="freeze the machine anew, and delete this")


def _processor() -> str:
    """Return what distinguishes this host's processor for a guest that has all of it."""
    text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    lines = [line for line in text.splitlines() if line.startswith(("vendor_id", "model name", "flags"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
