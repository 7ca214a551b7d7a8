"""Starting a virtual machine from what was frozen, and giving one that stands still the writable layer alone.

What is set anew in a copy, before anything in it can ask: random state and clock (QEMU gives it another generation id, too: its kernel
mixes that in by itself). A copy that is another machine gets a name, an id, an address and its hooks besides; its programs go on.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import disks, files, frozen, growth, lives, memory, pages, pending, ram, runner
from trivisor.vmm.engines.vm.argv import More
from trivisor.vmm.engines.vm.ice import Ice
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vmm.engines.vm.runner import Setup
from trivisor.vos import guest
from trivisor.vos.line import Line
from trivisor.vos.memory.foreign import Foreign

_STEPS = 60.0
_PIECE = 1 << 20


def thaw(box: Box, setup: Setup, whole: Ice, more: More | None, *, other: bool) -> str:
    """Run `box` on from `whole`; return in words how it was started. Raises EngineError, StorageError, GuestError."""
    if setup.shape.upper:
        disks.copy(whole.disk, box.dir.disk)
    lives.used(box.dir)
    with ExitStack() as stack:
        huge = box.spec.hugepages == "reserved"
        apart = box.spec.ram == "shared" or huge
        writing = pending.find(whole.folder)
        given = ram.provide(stack, box.home, setup, box.dir, whole, apart=apart, in_huge_pages=huge, writing=writing)
        work = lives.work(box, setup, given, state=whole.state)
        if more is not None:
            growth.remember(box, more.reach)
            work = replace(work, more=more, fill=partial(_fill, box, more, whole.folder / frozen.MORE))
        runner.run(setup, work)
    link = setup.net.steps if setup.net else ()
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        guest.configure(line, [("rested",), *lives.first(), *(lives.steps(box, setup.net) if other else link)], timeout=_STEPS)
    finally:
        line.close()
    return "from its frozen memory"


def _fill(box: Box, more: More, file: Path, qmp: Qmp, engine: int) -> None:
    """Write what was in memory that came while the machine ran into that of its copy, which is no file: the guest can give it back."""
    address = memory.where(box, qmp, more.physical)
    try:
        with file.open("rb") as stream, Foreign(engine, box.spec.name) as foreign:
            for begin, end in pages.segments(stream.fileno(), 0, more.reach):
                for at in range(begin, end, _PIECE):
                    foreign.write(address + at, os.pread(stream.fileno(), min(_PIECE, end - at), at))
    except OSError as error:
        raise files.storage(error, "reading the frozen memory") from error


def refill(box: Box, place: Path) -> None:
    """Give `box`, which does not run, the frozen writable layer. Raises StorageError."""
    whole, _ = frozen.load(place, box.spec.name)
    if box.spec.disk == "ram":
        return
    fresh = (place / frozen.FRESH).exists()
    if not fresh:
        lives.used(box.dir)
    disks.copy(whole.disk, box.dir.disk)
    if fresh:
        lives.fresh(box.dir).touch()
