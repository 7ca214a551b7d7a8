"""What one life of a virtual machine is made of: its run, the steps that make a guest this machine, the mark of an unused disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.paths import MachineDir
from trivisor.launch.net import passt, provide
from trivisor.launch.net.links import INSIDE
from trivisor.launch.net.provide import Net
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm.runner import Ram, Setup, Work


def work(box: Box, setup: Setup, memory: Ram, *, state: Path | None = None) -> Work:
    """Return the run of a machine, from a frozen `state` or from its kernel."""
    return Work(
        box.dir,
        box.slot,
        box.spec.name,
        memory,
        state=state,
        root=box.rootfs,
        disk=box.dir.disk if setup.shape.upper else None,
        ports=box.spec.ports,
        net=setup.net,
        cgroups=setup.cgroups,
        shared=box.spec if setup.shape.shares else None,
        owner=box.owner,
        ttl=box.spec.ttl,
        idle=box.spec.idle,
    )


def first() -> list[Sequence[str]]:
    """Return what comes before all else: nothing may draw from a random state that other copies had."""
    return [("seed", os.urandom(32).hex()), ("clock", str(time.time_ns()))]


def steps(box: Box, link: Net | None) -> list[Sequence[str]]:
    """Return what makes a guest this machine."""
    name = hashlib.sha256(f"machine {box.id}".encode()).digest()
    made: list[Sequence[str]] = [("hostname", box.spec.name), ("machine-id", name[:16].hex())]
    made += [("tmpfs", target, str(size)) for target, size in box.spec.tmpfs.items()]
    if link is not None:
        made += link.steps
    elif box.spec.network != "none":
        made += [("mac", INSIDE, provide.mac(box.id)), *passt.steps()]
    if box.spec.env:
        made.append(("env", *(f"{key}={value}" for key, value in box.spec.env.items())))
    made.append(("hooks",))
    return made


def fresh(place: MachineDir) -> Path:
    """A mark that lies beside a disk for as long as no guest has had it."""
    return place.root / "fresh"


def used(place: MachineDir) -> None:
    """Before a guest has the disk. Raises StorageError."""
    try:
        fresh(place).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{place.root} cannot be written: {error.strerror}") from error
