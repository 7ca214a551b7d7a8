"""A home that waits for a machine, for tests; and a program that counts in a machine."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from host_state import assert_nothing_left

from trivisor import VMM, Machine

DOWNTIME = 30.0
"""What a machine may stand still for here: QEMU 7.2 sends its memory only while it does."""
SHELL = "i=0; while :; do i=$((i+1)); echo $i >/run/next; mv /run/next /run/count; sleep 0.02; done"


class Elsewhere:
    """Another home, with the kits of `template` and no machines; with its images too if those are wanted."""

    def __init__(self, root: Path, template: Path, *, images: bool) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True)
        for part in ("kits", "store") if images else ("kits",):
            shutil.copytree(
                template / part, root / part, symlinks=True, ignore=shutil.ignore_patterns("trees", "tmp"), copy_function=_linked
            )

    def clear(self) -> None:
        with VMM(self.root) as vmm:
            for machine in vmm.list():
                machine.delete(force=True)
        assert_nothing_left(self.root, set())
        shutil.rmtree(self.root)


def _linked(source: str, target: str) -> None:
    """Blobs, roots and kits are never written in place."""
    if Path(source).suffix.startswith(".db") or "-wal" in source or "-shm" in source:
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Receiving:
    """A home that waits for one machine, in a thread."""

    def __init__(self, home: Path, address: str, **wishes: Any) -> None:
        self.vmm = VMM(home)
        self.address = ""
        self._result: Machine | None = None
        self._failure: BaseException | None = None
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address,), kwargs=wishes, daemon=True)
        self._thread.start()
        assert self._listens.wait(60)

    def machine(self) -> Machine:
        """Wait until it is there. Raises what receive raised."""
        self.join()
        if self._failure is not None:
            raise self._failure
        assert self._result is not None
        return self._result

    def join(self) -> None:
        self._thread.join(90)
        assert not self._thread.is_alive()

    def _run(self, address: str, **wishes: Any) -> None:
        def listening(where: str) -> None:
            self.address = where
            self._listens.set()

        try:
            self._result = self.vmm.receive(address, **{"listening": listening, "timeout": 30, **wishes})
        except BaseException as error:
            self._failure = error
        finally:
            self._listens.set()


@contextmanager
def receiving(home: Path, address: str = "127.0.0.1:0", **wishes: Any) -> Iterator[Receiving]:
    """Have the home at `home` wait for a machine; it has ended after the `with`."""
    there = Receiving(home, address, **wishes)
    try:
        yield there
    finally:
        there.join()
        there.vmm.close()


def count(machine: Machine) -> int:
    """How far the program in it has counted."""
    return int(machine.files.read("/run/count"))


def counts_on(machine: Machine, before: int) -> None:
    """Wait until it has counted further than that."""
    until(lambda: count(machine) > before)


def until(so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
