"""The fake engine (fake_engine.py), able to freeze: what it calls memory is a word in the machine's folder, "mind"."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from fake_engine import DISK, FakeEngine
from machine_home import IMAGE, TestHome

from trivisor import VMM, Machine
from trivisor.core.errors import HostLacks, StorageError
from trivisor.core.undo import Undo
from trivisor.launch import keeper
from trivisor.vmm.engine import Box, Progress
from trivisor.vmm.freezer import Frozen

MIND = "mind"
"""What a machine has in its memory: gone at its end, and what it was when it was frozen after a thaw."""


class FreezingEngine(FakeEngine):
    """`here` is what this host is, as `needs` say it."""

    here = "one"

    def freeze(
        self, box: Box, into: Path, *, memory: bool, ends: bool = False, lasting: bool = True, quiesce: bool = False, progress: Progress
    ) -> Frozen:
        self._step("freeze")
        shutil.copy(box.dir.root / DISK, into / DISK)
        if memory:
            (into / MIND).write_bytes(mind(box.dir.root))
        self._step("frozen")
        if ends:
            keeper.kill(box.dir)
        return Frozen({"host": self.here}, 0.001, {"quiesced": str(quiesce)})

    def fits(self, box: Box, needs: Mapping[str, str]) -> None:
        if needs.get("host", self.here) != self.here:
            raise HostLacks(f"it was frozen on {needs['host']}", machine=box.spec.name, hint="go there")

    def thaw(self, box: Box, frozen: Path, *, other: bool, undo: Undo, progress: Progress) -> dict[str, str]:
        shutil.copy(frozen / DISK, box.dir.root / DISK)
        undo.add("refilled", lambda: None)
        try:
            word = (frozen / MIND).read_bytes()
        except OSError as error:
            raise StorageError("its memory is gone", machine=box.spec.name) from error
        self._step("thaw")
        facts = self.start(box, undo, progress)
        (box.dir.root / MIND).write_bytes(word)
        return {**facts, "other": str(other)}

    def start(self, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
        (box.dir.root / MIND).unlink(missing_ok=True)
        return super().start(box, undo, progress)

    def refill(self, box: Box, frozen: Path, undo: Undo) -> None:
        self._step("refill")
        aside = box.dir.root / f"{DISK}.new"
        shutil.copy(frozen / DISK, aside)
        aside.rename(box.dir.root / DISK)


def mind(folder: Path) -> bytes:
    """Return what the machine in this folder has in its memory."""
    try:
        return (folder / MIND).read_bytes()
    except FileNotFoundError:
        return b""


def think(folder: Path, word: bytes) -> None:
    (folder / MIND).write_bytes(word)


def disk(folder: Path) -> bytes:
    return (folder / DISK).read_bytes()


def write(folder: Path, data: bytes) -> None:
    (folder / DISK).write_bytes(data)


def warm(vmm: VMM, home: TestHome, files: bytes) -> Machine:
    """Return a machine called web that runs, has `files` on its disk and something in mind."""
    machine = vmm.create(IMAGE, name="web")
    machine.start()
    think(home.folder(machine), b"warm")
    write(home.folder(machine), files)
    return machine
