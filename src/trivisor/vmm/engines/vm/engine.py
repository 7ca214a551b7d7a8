"""The vm wall: one QEMU a machine, cloned from ice where there is some.

A start goes the quickest way there is: from the ice of its image if the machine's disk is still as it was made; else
from the blank ice, mounting its disks; else (`ice` off, or a host that cannot) a boot. Every way ends in the same steps,
which make the machine itself: random seed, clock, name, address, environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from trivisor.core.errors import EngineError, HostLacks, InvalidSpec, StorageError, TrivisorError
from trivisor.core.paths import Home
from trivisor.core.spec import PASSING, Spec, Wall
from trivisor.core.undo import Undo
from trivisor.core.units import MIB
from trivisor.launch import jail, keeper, seccomp
from trivisor.launch.net import passt, provide
from trivisor.vmm.engine import Box, Progress, Usage, WallReport
from trivisor.vmm.engines.vm import (
    argv,
    disks,
    freezing,
    frozen,
    growth,
    ice,
    kit,
    limits,
    lives,
    making,
    memory,
    merging,
    migrating,
    probe,
    proc,
    qemu,
    ram,
    runner,
    sharing,
    stretch,
    thawing,
)
from trivisor.vmm.engines.vm.argv import Shape
from trivisor.vmm.engines.vm.growth import Growth
from trivisor.vmm.engines.vm.hotplug import Hotplug
from trivisor.vmm.engines.vm.ice import Ice
from trivisor.vmm.engines.vm.making import Image
from trivisor.vmm.engines.vm.qmp import Qmp, StateRefused
from trivisor.vmm.engines.vm.reading import helper, written
from trivisor.vmm.engines.vm.runner import Ram, Setup
from trivisor.vmm.engines.vm.streams import Source
from trivisor.vmm.freezer import Frozen
from trivisor.vmm.migration.messages import Hardware
from trivisor.vmm.migration.mover import Arrival
from trivisor.vos import guest
from trivisor.vos.files import Files
from trivisor.vos.line import Line
from trivisor.vos.ports import FEATURES, MemoryPort, SyscallPort
from trivisor.vos.processes import Processes

_STEPS = 60.0
_FEATURES = {"pause": True, "disk": True, "own_kernel": True, "ice": True}


class VmEngine:
    """Drives QEMU for the machines of `home`. `qemu` is its path (default: $TRIVISOR_QEMU, else the one in PATH).

    `ice` (default: $TRIVISOR_ICE, else "image") is how far starts are prepared: "image" keeps ice of each image in use,
    "blank" one for all images, "off" boots every machine.
    """

    wall: Wall = "vm"

    def __init__(self, home: Home, qemu: str | None = None, *, ice: str | None = None) -> None:
        self._home = home
        self._qemu = qemu
        self._ice = ice if ice is not None else os.environ.get("TRIVISOR_ICE", "image")
        if self._ice not in ("image", "blank", "off"):
            raise InvalidSpec(f"ice must be image, blank or off, not {self._ice!r}", hint="unset TRIVISOR_ICE")

    def report(self) -> WallReport:
        details: dict[str, str] = {}
        try:
            found = self._found()
            verdict = probe.verdict(found, self._home)
            details["qemu"] = f"{found.version} ({found.path})"
            details["accelerator"] = f"{verdict.accel}: {verdict.why}"
            details["jail"] = str(jail.probe())
            disks.check()
        except TrivisorError as error:
            return WallReport(wall=self.wall, available=False, why=str(error), remedy=error.hint, details=details)
        details |= provide.details()
        kits = [name for name in kit.FLAVOURS if kit.have(self._home, name)]
        details["kits"] = ", ".join(kits) or "none yet: the first start fetches one"
        features = {**_FEATURES, "kvm": verdict.accel == "kvm", "nat": provide.nat()}
        return WallReport(wall=self.wall, available=True, features=features, details=details)

    def check(self, spec: Spec) -> None:
        self._found()
        kit.check(spec.kernel)
        if spec.disk != "ram":
            disks.check()
            if spec.disk > argv.DUMMY:
                raise InvalidSpec(f"disk must be at most {argv.DUMMY >> 30}G, not {spec.disk} bytes")
        provide.check(spec)
        sharing.shares(spec)
        limits.check(spec)
        ram.check(spec)

    def create(self, box: Box, undo: Undo) -> None:
        if box.spec.disk == "ram":
            return
        undo.add("disk", lambda: box.dir.disk.unlink(missing_ok=True))
        disks.create(box.home, box.spec.disk, box.dir.disk)
        undo.add("fresh", lambda: lives.fresh(box.dir).unlink(missing_ok=True))
        lives.fresh(box.dir).touch()

    def start(self, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
        setup, why = self._setup(box.spec, progress)
        return self._bring(box, setup, why, undo, lambda given: self._run(box, given, progress))

    def _bring(self, box: Box, setup: Setup, why: str, undo: Undo, run: Callable[[Setup], str]) -> dict[str, str]:
        """Make what a running machine has beside its QEMU, have `run` start that, and return the facts."""
        begun = time.monotonic()
        growth.forget(box)
        frozen.note(box, setup)
        with ExitStack() as stack:
            if setup.shape.tap:
                link = stack.enter_context(provide.provide(box.home, box.dir, box.id, box.slot, box.spec, "tap", undo))
                setup = replace(setup, net=link)
            elif setup.shape.network:
                passt.free(box.spec.ports, box.spec.name)
            setup = replace(setup, cgroups=stack.enter_context(limits.group(box)))
            undo.add("qemu", lambda: keeper.kill(box.dir))
            way = run(setup)
        if box.spec.dedupe:
            self.merge(box, True)
        took = f"{(time.monotonic() - begun) * 1000:.0f} ms"
        return {
            "qemu": setup.qemu.version,
            "accelerator": f"{setup.shape.accel} ({why})",
            "kernel": setup.kit.release,
            "start": f"{way}, {took}",
            "jail": str(setup.jail),
            **(setup.net.facts if setup.net else {"network": box.spec.network}),
        }

    def pause(self, box: Box) -> None:
        with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
            qmp.ask("stop")

    def resume(self, box: Box) -> None:
        with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
            qmp.ask("cont")

    def paused(self, box: Box) -> bool:
        with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
            return not qmp.ask("query-status")["running"]

    def usage(self, box: Box) -> Usage:
        """QEMU's and the keeper's. Private is anonymous memory: what ice, programs and libraries share with others is not."""
        pids = [pid for pid in (runner.engine(box.dir), proc.keeper_pid(box.dir)) if pid is not None]
        return proc.usage(pids, own_shm=box.spec.ram == "shared")

    def merge(self, box: Box, on: bool) -> None:
        """Offer its RAM to the host's kernel for merging, or take the offer back: what was merged is then its own again."""
        merging.merge(box, on)

    def syscalls(self, box: Box | None = None) -> SyscallPort:
        return SyscallPort(self.wall, frozenset(FEATURES), seccomp.OPEN)

    def memory(self, box: Box) -> MemoryPort:
        return memory.port(self._home, box)

    def growth(self, box: Box) -> Growth:
        """Return what changes the memory and the vCPUs of a running machine."""
        return Growth(box)

    def grow_disk(self, box: Box, size: int, timeout: float) -> None:
        """Make the writable layer of a running machine `size` bytes."""
        stretch.live(box, size, timeout)

    def hotplug(self, box: Box) -> Hotplug:
        """Return what plugs devices into a running machine, and pulls them out."""
        return Hotplug(box)

    def written(self, box: Box, into: BinaryIO) -> None:
        """Write what a machine that stands still wrote to `into`, as its guest would list it (PROTOCOL.md, "upper").

        Raises EngineError, GuestError, StorageError, HostLacks; ImageError for a disk that cannot be read.
        """
        assert box.spec.disk != "ram"
        if lives.fresh(box.dir).exists():
            into.write(b"e")
            into.flush()
            return
        setup, _ = self._setup(helper(self._home, box.spec), lambda _: None)
        written(self._home, setup, box.dir.disk, box.spec.disk, into, booted=self._ice == "off")

    def freeze(
        self, box: Box, into: Path, *, memory: bool, ends: bool = False, lasting: bool = True, quiesce: bool = False, progress: Progress
    ) -> Frozen:
        """Freeze a machine (vmm/freezer.py)."""
        if memory:
            sealed = ram.sealed(self._found(), jail.probe())
            return freezing.freeze(box, into, ends=ends, lasting=lasting, quiesce=quiesce, sealed=sealed, progress=progress)
        return freezing.freeze_disk(box, into, fresh=lives.fresh(box.dir).exists(), lasting=lasting, quiesce=quiesce)

    def fits(self, box: Box, needs: Mapping[str, str]) -> None:
        """Raise HostLacks if this host cannot run on what was frozen with these needs."""
        found = self._found()
        frozen.differs(box, found, probe.verdict(found, self._home).accel, needs)

    def thaw(self, box: Box, place: Path, *, other: bool, undo: Undo, progress: Progress) -> dict[str, str]:
        """Start `box` from what was frozen with its memory (vmm/freezer.py)."""
        whole, known = frozen.load(place, box.spec.name)
        if known.shape is None:
            raise StorageError("it was frozen without its memory", machine=box.spec.name, hint="refill a machine with it, and start that")
        self.fits(box, known.needs)
        frozen.agree(box, known.shape, known.more)
        setup, why = self._setup(box.spec, progress, known.shape)
        return self._bring(box, setup, why, undo, lambda given: thawing.thaw(box, given, whole, known.more, other=other))

    def refill(self, box: Box, place: Path, undo: Undo) -> None:
        """Give `box`, which does not run, the frozen writable layer (vmm/freezer.py)."""
        thawing.refill(box, place)

    def leaving(self, box: Box) -> Hardware:
        """Return what a running machine needs of another host to go on there (vmm/migration/mover.py)."""
        return migrating.describe(box)

    def departure(self, box: Box) -> Source:
        """Return what sends a running machine's disk and memory."""
        return Source(box)

    def suits(self, box: Box, hardware: Hardware) -> None:
        """Raise HostLacks, StorageError or MigrationError if such a machine cannot go on here."""
        try:
            self.fits(box, hardware.needs)
        except HostLacks as error:
            raise migrating.worded(error) from error
        migrating.check(box, hardware)

    def arrive(self, box: Box, hardware: Hardware, arrival: Arrival, undo: Undo, progress: Progress) -> dict[str, str]:
        """Run the machine that `arrival` brings (vmm/migration/mover.py)."""
        setup, why = self._setup(box.spec, progress, migrating.shape(hardware))
        migrating.make_disk(box.dir, hardware.disk)
        return self._bring(box, setup, why, undo, lambda given: migrating.arrive(box, given, arrival))

    def sweep(self, home: Home, machines: set[str]) -> list[str]:
        return kit.sweep(home) + ice.sweep(home)

    def _found(self) -> qemu.Qemu:
        return qemu.inspect(qemu.locate(self._qemu), self._home)

    def _setup(self, spec: Spec, progress: Progress, like: Shape | None = None) -> tuple[Setup, str]:
        """Return what a machine of this spec is run with, and why it is run so; `like` a machine that was frozen."""
        found = self._found()
        verdict = probe.verdict(found, self._home)
        fixed = verdict.accel == "tcg" and found.translates_by_address
        linked = spec.network != "none"
        tap = linked and not provide.possible()
        shape = argv.Shape(verdict.accel, int(spec.cpus), spec.memory, spec.disk != "ram", linked, fixed, tap, sharing.shares(spec))
        shape = like or replace(shape, spare_cpus=limits.spare_cpus(spec), room=growth.ROOM)
        return Setup(found, shape, kit.get(self._home, spec.kernel, progress), jail.probe()), verdict.why

    def _run(self, box: Box, setup: Setup, progress: Progress) -> str:
        """Start the machine in the quickest way; say in words which it was."""
        fresh = self._ice == "image" and (box.spec.disk == "ram" or lives.fresh(box.dir).exists())
        mount = making.mount_steps(box.rootfs, setup.shape.upper)
        if self._ice == "off" or setup.shape.shares is not None or box.spec.hugepages == "transparent":
            # A daemon that shares a folder maps the machine's RAM, and that of ice is mapped by nobody else; and it is a file's.
            lives.used(box.dir)
            self._boot(box, setup, mount)
            return "booted"
        making.ensure_blank(self._home, setup, progress)
        if fresh:
            image = Image(box.rootfs, box.rootfs_digest, None if box.spec.disk == "ram" else box.spec.disk)
            name = making.image_key(setup, image)
            ran = self._home.cache / f"ran-{name}"
            if ran.exists() and PASSING not in box.spec.labels:
                making.ensure_image(self._home, setup, image, progress)
            with ice.using(self._home, name, progress) as found:
                if found is not None and not ice.disk_whole(found):
                    ice.drop(self._home, name)
                    found = None
                if found is not None:
                    if box.spec.disk != "ram":
                        disks.copy(found.disk, box.dir.disk)
                    lives.used(box.dir)
                    self._clone(box, setup, found, [])
                    return "from the image's ice"
        with ice.using(self._home, making.blank_key(setup), progress) as blank:
            lives.used(box.dir)
            if blank is None:
                raise StorageError("the ice was removed while it was needed", machine=box.spec.name, hint="start again")
            self._clone(box, setup, blank, mount)
        if fresh and PASSING not in box.spec.labels:
            ran.touch()
        return "from blank ice"

    def _boot(self, box: Box, setup: Setup, mount: Sequence[Sequence[str]]) -> None:
        with ExitStack() as stack:
            huge = box.spec.hugepages == "reserved"
            apart = box.spec.ram == "shared" or huge
            given = ram.empty(stack, setup.shape.memory // MIB * MIB, in_huge_pages=huge) if apart else Ram("anonymous")
            runner.run(setup, lives.work(box, setup, given))
        disks_there = [("wait", making.ROOT_DISK), *([("wait", making.UPPER_DISK)] if setup.shape.upper else [])]
        self._configure(box, setup, [*disks_there, *mount])

    def _clone(self, box: Box, setup: Setup, cold: Ice, mount: Sequence[Sequence[str]]) -> None:
        """Run the machine on from `cold`, whose use the caller holds."""
        with ExitStack() as stack:
            huge = box.spec.hugepages == "reserved"
            apart = box.spec.ram == "shared" or huge
            given = ram.provide(stack, self._home, setup, box.dir, cold, apart=apart, in_huge_pages=huge)
            try:
                runner.run(setup, lives.work(box, setup, given, state=cold.state))
            except EngineError as error:
                if isinstance(error.__cause__, StateRefused):
                    ice.drop(self._home, cold.facts.key)
                    error.hint = f"that ice was thrown away: start again; {error.hint}"
                raise
        self._configure(box, setup, mount)

    def _configure(self, box: Box, setup: Setup, mount: Sequence[Sequence[str]]) -> None:
        """Make the guest this machine. The seed goes first: nothing may draw from a random state that other clones had."""
        line = Line.connect(box.dir.line, box.spec.name)
        try:
            guest.configure(
                line,
                [
                    *lives.first(),
                    *mount,
                    *stretch.steps(box),
                    *sharing.steps(box.spec, setup.shape.shares, setup.kit.shares),
                    *lives.steps(box, setup.net),
                ],
                timeout=_STEPS,
            )
            stretch.done(box)
            if box.spec.oom == "stop":
                Files(Processes(lambda: line, box.spec.name)).write("/proc/sys/vm/panic_on_oom", b"1\n")
        finally:
            line.close()
