"""A home with one tiny image and the fake engine, for the tests of machines; and children that die in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fake_engine import FakeEngine, engine_pid

from trivisor.core import undo
from trivisor.launch import tvinit
from trivisor.vmm.machine import Machine
from trivisor.vmm.manager import VMM

IMAGE = "tiny"
KILLED = -9


class TestHome:
    """One home, a copy of `template`; `open` may be called any number of times, as by as many processes."""

    __test__ = False
    image = IMAGE

    def __init__(self, root: Path, template: Path) -> None:
        self.root = root
        # Unpacked roots are many files, and made again where a wall needs one.
        shutil.copytree(template, root, symlinks=True, copy_function=_copy, ignore=shutil.ignore_patterns("trees"))

    def open(self, engine: FakeEngine | None = None) -> VMM:
        return VMM(self.root, engines=[engine or FakeEngine()])

    def power_off(self, machine: Machine) -> None:
        """Have the guest power itself off."""
        os.kill(engine_pid(self.folder(machine)), signal.SIGTERM)

    def folder(self, machine: Machine) -> Path:
        return self.root / "machines" / machine.id

    def clear(self) -> None:
        """Delete every machine, so that no test leaves a process behind."""
        if not (self.root / "trivisor.db").exists():
            return
        with self.open() as vmm:
            for machine in vmm.list():
                machine.delete(force=True)


class VmHome(TestHome):
    """One home whose machines are virtual: image, kit and ice are those of `template`."""

    image = "debian"

    def open(self, engine: FakeEngine | None = None) -> VMM:
        assert engine is None
        return VMM(self.root)

    def power_off(self, machine: Machine) -> None:
        machine.spawn("kill -TERM 1", detach=True)


def _copy(source: str, target: str) -> None:
    """Link what is never written in place, so that a home of gigabytes is copied at once."""
    if "/blobs/" in source or "/roots/" in source or "/ice/" in source or "/kits/" in source:
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def tiny_template(folder: Path) -> Path:
    """Make a home whose only content is the image, or skip: its machines are a real keeper and guest on the host."""
    if not tvinit.path().exists():
        pytest.skip("needs the compiled guest program (make -C guest)")
    root, source = folder / "home", folder / "image"
    source.mkdir()
    (source / "hello").write_text("hello\n")
    with VMM(root, engines=[FakeEngine()]) as vmm:
        vmm.images.import_(source, IMAGE)
    return root


def die_at_undo(number: int) -> None:
    """Have this process end itself at the Nth thing that could be taken back (core/undo.py, `observer`)."""
    left = number

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    undo.observer = count


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child and return its exit status: 0, 1 if it raised, -N if signal N killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # the child must not go on as a second pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
