"""Reading the disk of a machine that stands still, in a helper machine: the host never mounts what a guest wrote.

The helper is a clone of blank ice, in a folder of its own under home.tmp, jailed like any other, without a network, and tied to this
process. It has a copy of the disk, so that it can replay the journal, and sends what lies in the upper folder (PROTOCOL.md, "upper").
What it sends is as hostile as the disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from trivisor.core.errors import EngineError, ExecTimeout, GuestError, GuestGone, ImageError, StorageError, WaitTimeout
from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import Spec
from trivisor.launch import keeper
from trivisor.vmm.engines.vm import disks, files, ice, kit, making, ram, runner
from trivisor.vmm.engines.vm.runner import Ram, Setup, Work
from trivisor.vos import guest
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes

MEMORY = "128M"
TIMEOUT = 900.0
"""Seconds for all of it: a disk of a few GB takes a minute or two in an emulated guest."""
_STEPS = 60.0
_NAME = "disk reader"
_SLOT = 98_000_000
"""Above every machine's slot, and below those of makers of ice."""
_PIECE = 1 << 20
_HINT = "start it and have its file system checked"
_METADATA = 512 << 20
"""Bytes that names and attributes may take beside the data, which cannot be more than the disk unless files share it."""


def helper(home: Home, spec: Spec) -> Spec:
    """Return what the helper for the disk of a machine with `spec` is to be."""
    kernel = "micro" if kit.have(home, "micro") else spec.kernel
    return Spec.make(image=spec.image, name="reader", wall="vm", memory=MEMORY, network="none", disk=spec.disk, kernel=kernel)


def written(home: Home, setup: Setup, disk: Path, size: int, into: BinaryIO, *, booted: bool = False) -> None:
    """Write what lies in the upper folder of `disk`, of `size` bytes, to `into`. `booted`: without ice.

    Raises EngineError, GuestError, StorageError, ImageError if the disk cannot be read.
    """
    with files.workspace(home, "reading") as folder:
        place = MachineDir(folder / "machine")
        place.logs.mkdir(parents=True, mode=0o700)
        disks.copy(disk, place.disk)
        none = folder / "none"
        none.write_bytes(bytes(512))
        none.chmod(0o444)
        with _running(home, setup, place, none, booted) as line:
            _receive(Processes(lambda: line, _NAME), into, size + _METADATA)


@contextlib.contextmanager
def _running(home: Home, setup: Setup, place: MachineDir, root: Path, booted: bool) -> Iterator[Line]:
    slot = _SLOT + int.from_bytes(os.urandom(4)) % 1_000_000
    try:
        if booted:
            runner.run(setup, Work(place, slot, _NAME, Ram("anonymous"), root=root, disk=place.disk, owner=os.getpid(), ttl=TIMEOUT))
        else:
            making.ensure_blank(home, setup, lambda _: None)
            with ice.using(home, making.blank_key(setup), lambda _: None) as blank, ExitStack() as stack:
                if blank is None:
                    raise StorageError("the ice was removed while it was needed", hint="do it again")
                given = ram.provide(stack, home, setup, place, blank)
                work = Work(place, slot, _NAME, given, state=blank.state, root=root, disk=place.disk, owner=os.getpid(), ttl=TIMEOUT)
                runner.run(setup, work)
        line = Line.connect(place.line, _NAME)
        try:
            guest.configure(line, [("seed", os.urandom(32).hex()), ("wait", making.UPPER_DISK)], timeout=_STEPS)
            yield line
        finally:
            line.close()
    except (EngineError, GuestError) as error:
        files.check_room(place.root, "reading the machine's disk", error)
        raise
    finally:
        keeper.kill(place)


def _receive(processes: Processes, into: BinaryIO, limit: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    try:
        with processes.builtin(["upper", making.UPPER_DISK]) as process:
            while data := process.stdout.read(_PIECE, _left(deadline)):
                limit -= len(data)
                if limit < 0:
                    raise ImageError("the machine's disk holds more than there is room for on it", hint="its files share their data")
                into.write(data)
            if process.wait(_left(deadline)):
                said = process.stderr.read(4096, _left(deadline)).decode("utf-8", "replace").strip()
                raise ImageError(f"the machine's disk cannot be read: {said[:300]}", hint=_HINT)
        into.flush()
    except WaitTimeout as error:
        raise ExecTimeout(processes.machine, TIMEOUT) from error
    except GuestGone as error:
        raise ImageError("the machine's disk cannot be read: the kernel of the helper that read it died of it", hint=_HINT) from error
    except OSError as error:
        raise files.storage(error, "reading the machine's disk") from error


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
