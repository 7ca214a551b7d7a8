"""Freezing a virtual machine while it runs, so that any number of machines can go on from there.

QEMU is stopped, which drains and flushes its disks; its devices are saved without RAM, the pages taken that it does not share with its ice,
its writable layer copied, and it goes on. What is left to do is done beside it: that of a fork while its children start.

A large writable layer is not copied in that pause. QEMU keeps for us what the guest overwrites meanwhile (blockdev-backup), so a disk
stays one file without a backing file, however often it is frozen.

A QEMU whose stopper dies would stand still for ever. So before it is stopped, a letter is put in its mail (`Qmp.letter`): to go on, when
the connection by which it was stopped has ended, however that came about. To a machine that runs by then it is no news.

Only a machine that has the devices it was started with is frozen with its memory: a copy has no others to load their state into.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trivisor.core.errors import EngineError, GuestGone, InvalidState, UnsupportedByWall
from trivisor.core.units import MIB
from trivisor.launch import keeper
from trivisor.vmm.engine import Box, Progress
from trivisor.vmm.engines.vm import backup, files, frozen, growth, hotplug, pages, pending, ram, runner
from trivisor.vmm.engines.vm.argv import Shape
from trivisor.vmm.engines.vm.frozen import Facts
from trivisor.vmm.engines.vm.memory import where
from trivisor.vmm.engines.vm.pages import Pages
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vmm.freezer import Frozen
from trivisor.vos import guest
from trivisor.vos.line import Line
from trivisor.vos.memory.foreign import Foreign

_STARTED = frozenset({"ports", "root-disk", "upper-disk", "nic", "random", "generation"})
"""The devices with names that a machine is started with, beside spare ports and shared folders (argv.py)."""
_SYNC = 60.0
_STOP = 60.0
"""Seconds: what the guest gave to its disk is written before QEMU stands still."""
_REST = 20_000
"""Milliseconds, of the guest's own clock, for which nothing may be written."""


def freeze(box: Box, into: Path, *, ends: bool, lasting: bool, quiesce: bool, sealed: bool, progress: Progress) -> Frozen:
    """Freeze a machine that runs or is paused, with its memory (vmm/freezer.py). `sealed`: its copies have their RAM so (ram.py)."""
    known = frozen.life(box.dir, box.spec.name)
    pid = runner.engine(box.dir)
    if pid is None:
        raise GuestGone("its QEMU has ended", machine=box.spec.name)
    with ExitStack() as stack:
        try:
            target = stack.enter_context((into / frozen.RAM).open("wb", buffering=0))
            # A copy's QEMU, which may open it before it is whole, has an id of its own.
            os.fchmod(target.fileno(), 0o444)
            with Foreign(pid, box.spec.name) as foreign, Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
                movable(box, qmp, known.shape)
                facts = frozen.begin(known.shape, known.needs, growth.more(box, qmp))
                first = ram.sealable(stack, facts.key) if sealed and not (lasting or ends) else None
                own = _memory(stack, box, qmp, foreign, facts, into, target.fileno() if first is None else first)

                def finish(filled: Callable[[], None] = lambda: None) -> None:
                    for part in own:
                        part.after()
                    if first is not None:
                        ram.seal(first)
                        filled()
                        files.copy_sparse(first, target.fileno())
                    frozen.finish(into, facts, lasting=lasting or ends)

                with _at_rest(box, qmp, quiesce and not ends):
                    stood = _take(box, qmp, into, known.shape, own, finish if ends else None)
            if lasting and not ends:
                progress("writing what was taken")
                finish()
            elif not ends:
                rest = stack.pop_all()
                pending.Pending(into, facts, lambda filled: _beside(rest, lambda: finish(filled)), first).start()
        except OSError as error:
            raise files.storage(error, "freezing the machine") from error
    sizes = {"own": sum(part.written for part in own), "shared": sum(part.copied for part in own)}
    said = {name: f"{size // MIB} MiB" for name, size in sizes.items()} if lasting or ends else {}
    return Frozen(known.needs, stood.seconds, said)


def _memory(stack: ExitStack, box: Box, qmp: Qmp, foreign: Foreign, facts: Facts, into: Path, target: int) -> list[Pages]:
    """Return what the machine has of memory: that of its start last, which others wait for."""
    found = []
    if facts.more is not None and facts.more.reach:
        file = stack.enter_context((into / frozen.MORE).open("wb", buffering=0))
        place = where(box, qmp, facts.more.physical)
        found.append(stack.enter_context(pages.opened(foreign, place, facts.more.reach, file.fileno())))
    found.append(stack.enter_context(pages.opened(foreign, where(box, qmp), growth.sizes(qmp).base, target)))
    return found


def _take(box: Box, qmp: Qmp, into: Path, shape: Shape, own: Sequence[Pages], end: Callable[[], object] | None) -> Stood:
    """Take all that changes while the machine runs, with it standing still. With `end` it does not go on: `end`, and then it is ended."""
    with ExitStack() as stack:
        # QEMU writes it to memory: of a disk that is full it says no more than that something failed.
        state = stack.enter_context(open(os.memfd_create("state"), "rb"))
        disk = stack.enter_context(backup.opened(box, qmp, into / frozen.DISK, at_once=end is not None)) if shape.upper else None
        for part in own:
            part.before()
        if disk is not None:
            disk.before()
        with still(box, qmp) as stood:
            with open(f"/proc/self/fd/{state.fileno()}", "wb", buffering=0) as given:
                qmp.state_to(given.fileno())
            if disk is not None:
                disk.take()
            for part in own:
                part.take()
            if end is not None:
                _write(state, into / frozen.STATE)
                end()
                keeper.kill(box.dir)
        if end is None:
            _write(state, into / frozen.STATE)
        if disk is not None and end is None:
            disk.after()
    return stood


def _write(source: BinaryIO, target: Path) -> None:
    with target.open("xb") as stream:
        files.copy_sparse(source.fileno(), stream.fileno())


def _beside(stack: ExitStack, finish: Callable[[], object]) -> None:
    with stack:
        finish()


def freeze_disk(box: Box, into: Path, *, fresh: bool, lasting: bool, quiesce: bool) -> Frozen:
    """Freeze the writable layer alone, of a machine that runs, is paused, or stands still. `fresh`: no guest has had it yet."""
    if box.spec.disk == "ram":
        error = UnsupportedByWall("freeze the files of a machine alone that has them in its memory", "vm", machine=box.spec.name)
        error.hint = "freeze its memory too, or make it with a disk"
        raise error
    needed = {"wall": "vm", "root": box.rootfs_digest}
    stood = Stood()
    try:
        if keeper.alive(box.dir):
            with ExitStack() as stack:
                qmp = stack.enter_context(Qmp.connect(box.dir.qmp, box.spec.name))
                if qmp.ask("query-status")["running"]:
                    _sync(box)
                copy = stack.enter_context(backup.opened(box, qmp, into / frozen.DISK))
                copy.before()
                with _at_rest(box, qmp, quiesce), still(box, qmp) as stood:
                    copy.take()
                copy.after()
        else:
            files.copy_file(box.dir.disk, into / frozen.DISK)
        if fresh:
            (into / frozen.FRESH).touch()
        frozen.finish(into, frozen.begin(None, needed), lasting=lasting)
    except OSError as error:
        raise files.storage(error, "freezing the machine") from error
    return Frozen(needed, stood.seconds)


class Stood:
    """For how long a machine stood still."""

    seconds = 0.0


@contextmanager
def still(box: Box, qmp: Qmp) -> Iterator[Stood]:
    """Have the machine stand still, and then go on if it ran before. Raises EngineError."""
    stood = Stood()
    if not qmp.ask("query-status")["running"]:
        yield stood
        return
    with qmp.letter(box.dir.qmp, ["cont"]):
        began = time.monotonic()
        qmp.ask("stop", timeout=_STOP)
        try:
            yield stood
        finally:
            # Should QEMU have ended, then that is what it was to do, or is said by what failed.
            with suppress(EngineError):
                qmp.ask("cont")
            stood.seconds = time.monotonic() - began


def movable(box: Box, qmp: Qmp, shape: Shape) -> None:
    """Raise UnsupportedByWall for a machine whose devices no other QEMU could go on with."""

    def refuse(what: str, hint: str) -> UnsupportedByWall:
        error = UnsupportedByWall(f"freeze the memory of a machine with {what}", "vm", machine=box.spec.name)
        error.hint = hint
        return error

    if shape.shares is not None:
        raise refuse("volumes", "give memory=False: its disk alone is frozen then, and no volume is part of that")
    there = {str(entry["name"]) for entry in qmp.ask("qom-list", {"path": "/machine/peripheral"}) if entry["type"].startswith("child<")}
    for name in sorted(name for name in there - _STARTED if not name.startswith("spare")):
        if name.startswith(hotplug.PREFIX):
            raise refuse(f"a device that was attached to it, {name.removeprefix(hotplug.PREFIX)}", "detach it, and attach it again after")
        if name == "usb":
            raise refuse("a USB controller", "it came with the first USB device and stays until the machine is stopped")
        if name == growth.BALLOON:
            raise refuse("memory that was taken while it ran", "stop and start it: it has its memory from the start then")
    blocked = qmp.ask("query-migrate").get("blocked-reasons")
    if blocked:
        raise refuse("something that cannot be moved", str(blocked[0])[:200])


@contextmanager
def _at_rest(box: Box, qmp: Qmp, wished: bool) -> Iterator[None]:
    """With `wished`, nothing writes to the disk, and all that was written is there. Raises InvalidState, GuestError, GuestGone."""
    if not wished or box.spec.disk == "ram":
        yield
        return
    if not qmp.ask("query-status")["running"]:
        raise InvalidState(box.spec.name, "paused", "freeze with its file systems at rest", ["running"])
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        guest.configure(line, [("rest", str(_REST))], timeout=_SYNC)
        try:
            yield
        finally:
            # Should we not come to this, the guest lets them go on by itself.
            guest.configure(line, [("rested",)], timeout=_SYNC)
    finally:
        line.close()


def _sync(box: Box) -> None:
    """Have the guest write what its programs wrote: what it holds back is not on its disk. Raises GuestError, GuestGone."""
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        guest.configure(line, [("sync",)], timeout=_SYNC)
    finally:
        line.close()
