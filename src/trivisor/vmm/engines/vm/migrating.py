"""A virtual machine that moves to another QEMU while it runs: what it needs there, and how one there begins.

What a machine was started as is noted beside it (frozen.py); the target starts a QEMU of that very shape, with memory of its own and an
empty disk, and lets it wait. How the two are filled is said in streams.py; what lies between, in vmm/migration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec

from trivisor.core.errors import EngineError, HostLacks, MigrationError, StorageError, UnsupportedByWall
from trivisor.core.files import sha256
from trivisor.core.paths import MachineDir
from trivisor.core.process import find, run
from trivisor.core.units import MIB, format_size
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import argv, disks, files, freezing, frozen, lives, ram, runner, streams
from trivisor.vmm.engines.vm.argv import Shape
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vmm.engines.vm.runner import Ram, Setup
from trivisor.vmm.engines.vm.streams import Target
from trivisor.vmm.migration.messages import Hardware
from trivisor.vmm.migration.mover import Arrival
from trivisor.vos import guest
from trivisor.vos.line import Line

_LOOK, _SOON = 0.1, 0.002
_LOAD = 60.0
"""Seconds for QEMU to take the last of what came."""
_STEPS = 60.0
_CPUS = 1024
_SPARE = 64 * MIB
"""What a host's disk should have beside what comes."""


def describe(box: Box) -> Hardware:
    """Return what a running machine needs of another host. Raises UnsupportedByWall for one that cannot go on elsewhere."""
    known = frozen.life(box.dir, box.spec.name)
    with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
        try:
            freezing.movable(box, qmp, known.shape)
        except UnsupportedByWall as error:
            what = error.message.partition(" with ")[2]
            other = UnsupportedByWall(f"move a machine with {what}", "vm", machine=box.spec.name)
            other.hint = error.hint.partition(": its disk alone")[0]
            raise other from error
    disk = disks.size(box.dir.disk) if known.shape.upper else None
    return Hardware(
        shape=msgspec.to_builtins(known.shape),
        needs=known.needs,
        words=_words(known.shape),
        root=_digest(box.rootfs),
        memory=known.shape.memory,
        disk=disk,
        taken=box.dir.disk.stat().st_blocks * 512 if disk is not None else 0,
    )


def shape(hardware: Hardware) -> Shape:
    """Return the shape that the target's QEMU is to have. Raises MigrationError for what no machine here can be."""
    try:
        found = msgspec.convert(hardware.shape, Shape, strict=True)
    except msgspec.ValidationError as error:
        raise MigrationError(f"the machine's shape is none: {error}", hint="is it the same version?") from error
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    whole = 0 < found.memory == hardware.memory <= total and 1 <= found.cpus + found.spare_cpus <= _CPUS and 0 <= found.room < 1 << 50
    if not whole or found.shares is not None or found.upper != (hardware.disk is not None) or (hardware.disk or 0) > argv.DUMMY:
        raise MigrationError("the machine's shape is none that this host can give", hint="has it more memory than there is here?")
    return found


def worded(error: HostLacks) -> HostLacks:
    """Return what is said of a frozen machine as it is said of one that runs."""
    said = {"it was frozen with": "it runs with", "that froze it": "that runs it", "where it was frozen": "where it runs"}
    message, hint = error.message, error.hint
    for frozen_word, word in said.items():
        message, hint = message.replace(frozen_word, word), hint.replace(frozen_word, word)
    return HostLacks(message, machine=error.machine, hint=hint)


def check(box: Box, hardware: Hardware) -> None:
    """Raise HostLacks, StorageError or MigrationError if this host cannot go on with such a machine; the image's root is there."""
    if _words(shape(hardware)) != hardware.words:
        raise HostLacks("this version of trivisor gives a machine other hardware", hint="use the same version on both hosts")
    if _digest(box.rootfs) != hardware.root:
        hint = "the same squashfs-tools on both hosts make the same"
        raise HostLacks("the image's root, as it was made here, is not byte for byte what the guest has mounted", hint=hint)
    free = shutil.disk_usage(box.home.root).free
    if hardware.taken + _SPARE > free:
        raise StorageError(
            f"its disk holds {format_size(hardware.taken)}, and {format_size(free)} are free here", hint="free space, or set TRIVISOR_HOME"
        )


def make_disk(place: MachineDir, size: int | None) -> None:
    """Make the empty disk that the machine's is copied to."""
    if size is not None:
        run([find("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", place.disk, str(disks.rounded(size))], timeout=60)


def arrive(box: Box, setup: Setup, arrival: Arrival) -> str:
    """Run a QEMU until it has the machine that `arrival` brings, and the guest has answered; say in words what that was.

    Raises EngineError, MigrationError, GuestError.
    """
    target = Target(box)
    with ExitStack() as stack:
        huge = box.spec.hugepages == "reserved"
        apart = box.spec.ram == "shared" or huge
        given = ram.empty(stack, setup.shape.memory // MIB * MIB, in_huge_pages=huge) if apart else Ram("anonymous")
        work = lives.work(box, setup, given)
        runner.run(setup, replace(work, incoming=lambda: _take(box, target, setup.shape.upper, arrival)))
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        guest.configure(line, [*lives.first(), *(setup.net.steps if setup.net else ())], timeout=_STEPS)
    finally:
        line.close()
    return "moved here"


def _take(box: Box, target: Target, upper: bool, arrival: Arrival) -> None:
    """Fill a waiting QEMU, and let it run when the source has given the machine up."""
    if upper:
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            path = box.dir.root / "disk.sock"
            stack.callback(path.unlink, missing_ok=True)
            _listen(listener, path)
            target.export(listener.fileno())
            arrival.disk(_connected(path))
    ours, theirs = streams.pair()
    arrival.memory(ours)
    with theirs:
        target.take(theirs.fileno())
    arrival.ready()
    deadline: float | None = None
    while not _taken(target, arrival):
        arrival.look()
        if arrival.over() and deadline is None:
            deadline = time.monotonic() + _LOAD
        if deadline is not None and time.monotonic() > deadline:
            raise MigrationError(f"QEMU did not take the machine in {_LOAD:g} s", machine=box.spec.name)
        time.sleep(_SOON if deadline is not None else _LOOK)
    target.detach(exported=upper)
    arrival.loaded()
    target.go()
    arrival.gone_on()


def _taken(target: Target, arrival: Arrival) -> bool:
    try:
        return target.taken()
    except EngineError:
        # What broke the link is what broke the QEMU behind it.
        arrival.look()
        raise


def _listen(listener: socket.socket, path: Path) -> None:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.chmod(path.name, 0o600, dir_fd=folder)
    except OSError as error:
        raise files.storage(error, "making a socket in the machine's folder") from error
    finally:
        os.close(folder)
    listener.listen(1)


def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{path.name}")
    except OSError as error:
        sock.close()
        raise MigrationError(f"QEMU does not take the disk: {error.strerror}") from error
    finally:
        os.close(folder)
    return sock


def _words(shape: Shape) -> str:
    said = argv.command("qemu", shape, "anonymous", boot=False, hold=True, blank=True)
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise files.storage(error, "reading the machine's root") from error
