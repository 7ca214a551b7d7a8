"""`vm.memory`: one machine's memory, read and written from outside.

An address without a process is the kernel's (vm wall) and with `pid` that process's; physical addresses have methods of their own.
Nothing in the machine takes part, and nothing in it can tell. What is read in one call is of one moment: the machine stands still for
the copy, unless its host cannot stop it (a container without a freezer). `watch` alone lets it run on.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import BadAddress, InvalidSpec, NotFound, WaitTimeout
from trivisor.core.units import parse_size
from trivisor.vos.memory import dump, local, search, tasks
from trivisor.vos.memory.foreign import Foreign
from trivisor.vos.memory.kernel import Kernel
from trivisor.vos.memory.paging import PAGE, Page, Tables
from trivisor.vos.memory.physical import Physical, View
from trivisor.vos.memory.spaces import Local, Mapped, Space
from trivisor.vos.memory.stats import MemoryStats
from trivisor.vos.memory.tasks import GuestProcess
from trivisor.vos.ports import MemoryPort, Still

MAX_READ = 1 << 30
_TEXT = 0xFFFF_FFFF_8000_0000
"""Where x86-64 Linux maps the start of physical memory for its own text and data (Documentation/x86/x86_64/mm.rst)."""
_TOP = "init_top_pgt"


@dataclass(frozen=True)
class Change:
    """What a watch saw."""

    address: int
    before: bytes
    after: bytes


class Memory:
    """The memory of one machine."""

    def __init__(
        self,
        machine: str,
        port: Callable[[], MemoryPort],
        figures: Callable[[], MemoryStats],
        limit: Callable[[int | str, float], None],
        balloon: Callable[[int | str, float], int],
        reclaim: Callable[[int | None], int],
        merge: Callable[[bool], None],
        swap: Callable[[int | str | None], None],
    ) -> None:
        self._machine = machine
        self._port = port
        self._figures = figures
        self._limit = limit
        self._balloon = balloon
        self._reclaim = reclaim
        self._merge = merge
        self._swap = swap

    @property
    def features(self) -> frozenset[str]:
        """What this machine's wall can: physical, kernel, process (vos/ports.py)."""
        return self._port().features

    def swap(self, size: int | str | None) -> None:
        """Change how much of the host's swap it may have beside its memory ("64M", or bytes; 0: none; None: what the host has), at once if
        it runs, and from the next start on. Container and gvisor.

        Raises InvalidSpec for less than it has there now, UnsupportedByWall, HostLacks where the host cannot limit it.
        """
        self._swap(size)

    def dedupe(self, on: bool = True) -> None:
        """Have the host's kernel keep pages once that are equal to those of other machines that have it so, or not: at once if it runs
        (vm wall; `on=False` makes it whole again), and from the next start on. `vmm.dedupe.start()` has the kernel look for them.

        Raises UnsupportedByWall, InvalidSpec with ram="shared", HostLacks where the kernel has no KSM.
        """
        self._merge(on)

    def stats(self) -> MemoryStats:
        """Return what it may have, has, and takes of the host. Raises InvalidState unless it runs or is paused, GuestGone."""
        return self._figures()

    def limit(self, size: int | str, *, timeout: float = 10.0) -> None:
        """Change what it may have ("512M", or bytes): at once if it runs, and from the next start on.

        A virtual machine's guest has `timeout` seconds to take it or to give it back. Raises InvalidSpec for less than its programs hold
        now, or than a virtual machine was started with; GuestShort if a guest gave back only a part (its next start has the limit),
        GuestError if it did not take it (then nothing is changed); InvalidState for a virtual machine that is paused; HostLacks where the
        host cannot limit memory; OverBudget.
        """
        self._limit(size, timeout)

    def balloon(self, size: int | str, *, timeout: float = 10.0) -> int:
        """Have a virtual machine's guest give up `size` bytes of what it was started with, in all; 0 gives everything back to it.

        For machines whose RAM is their own: ram="shared", hugepages="transparent", or with volumes. Raises GuestShort, with what it gave up
        in `timeout` seconds (and keeps), UnsupportedByWall, InvalidSpec, InvalidState unless it runs.
        """
        return self._balloon(size, timeout)

    def reclaim(self, size: int | str | None = None) -> int:
        """Have the host take back `size` bytes that the machine does not need now, or without `size` all that it can: files that were read,
        and what can be swapped; of a virtual machine whose RAM is its own, what its guest has free. Return how many it took: fewer, or with
        cgroup v1 more. Raises UnsupportedByWall, HostLacks, InvalidState for a virtual machine that is paused.
        """
        return self._reclaim(None if size is None else parse_size(size))

    @property
    def symbols(self) -> Mapping[str, int]:
        """The addresses of the kernel's symbols, by name. Raises NotFound for a kernel that has none with it, UnsupportedByWall."""
        return self._kernel(self._need("kernel")).symbols

    # -- physical ---------------------------------------------------------------------------------

    def view(self, start: int = 0, size: int | None = None) -> View:
        """Return a copy of physical memory as a buffer; without `size`, up to the end of the run of memory that `start` is in.

        The copy is private: writing to it changes nothing in the machine. Of a machine made with ram="shared" it is no copy but the
        memory itself, which changes as the machine runs and is written to by writing to it; `start` must be a multiple of 4096 then. (What
        the machine was given while it ran is copied in any case.)
        Raises BadAddress, InvalidSpec, UnsupportedByWall, GuestGone.
        """
        with self._physical(self._need("physical"), still=True) as (physical, held):
            if size is None:
                _range(start, 1)
                size = next((run.physical + run.size - start for run in physical.ram if 0 <= start - run.physical < run.size), 1)
            _range(start, size)
            if held.shared is None or not physical.mapped(start):
                return physical.copy(start, size)
            return physical.map(held.shared, start, size)

    def dump(self, path: str | os.PathLike[str]) -> int:
        """Write all of physical memory to the new file `path`, each byte at its address, what is zero as a hole; return the file's size.

        The machine stands still until it is written. Raises StorageError (the file is there already, too), UnsupportedByWall, GuestGone.
        """
        with self._physical(self._need("physical"), still=True) as (physical, _):
            return dump.write(physical, physical.ram, Path(path), self._machine)

    def read_physical(self, address: int, size: int) -> bytes:
        """Return `size` bytes (up to 1 GiB; `view` copies more). Raises BadAddress, UnsupportedByWall, GuestGone."""
        _range(address, size, MAX_READ)
        with self._physical(self._need("physical"), still=True) as (physical, _):
            return physical.read(address, size)

    def write_physical(self, address: int, data: bytes) -> None:
        """Write `data`. Raises BadAddress, UnsupportedByWall, GuestGone.

        Without KVM, code of the guest that has run is translated already and stays as it was.
        """
        _range(address, len(data))
        with self._physical(self._need("physical"), still=True) as (physical, _):
            physical.write(address, data)

    # -- virtual ----------------------------------------------------------------------------------

    def read(self, address: int, size: int, *, pid: int | None = None) -> bytes:
        """Return `size` bytes (up to 1 GiB) at a virtual address. Raises BadAddress where nothing is mapped, NotFound, GuestGone."""
        _range(address, size, MAX_READ)
        with self._space(pid) as space:
            return space.read(address, size)

    def write(self, address: int, data: bytes, *, pid: int | None = None) -> None:
        """Write `data` at a virtual address. Raises BadAddress, NotFound, GuestGone.

        On the vm wall it goes to the page that is mapped there, which others may share (a library's code, what a fork has not yet
        written to), whether the program may write to it or not; on the container wall only to what the program itself may write to.
        """
        _range(address, len(data))
        with self._space(pid) as space:
            space.write(address, data)

    def page(self, address: int, *, pid: int | None = None) -> Page:
        """Return how a virtual address is mapped: the physical address, the page's size, what may be done with it. Raises BadAddress."""
        port = self._need("kernel")
        with self._physical(port, still=True) as (physical, still):
            return self._tables(port, physical, still, pid).page(address)

    def search(
        self, pattern: bytes | re.Pattern[bytes], *, pid: int | None = None, start: int = 0, end: int = 1 << 64, limit: int = 1000
    ) -> list[int]:
        """Return the addresses of the first `limit` places where `pattern` is: of a process, or without `pid` physical ones.

        What matches must lie in neighbouring pages. Raises BadAddress if a process maps more than 16 GiB, NotFound, UnsupportedByWall.
        """
        expression = search.compiled(pattern)
        if limit < 1:
            raise InvalidSpec(f"limit must be 1 or more, not {limit}")
        if pid is not None:
            with self._space(pid) as space:
                return search.find(search.joined(space.runs(start, end), start, end), space.fill, expression, limit)
        with self._physical(self._need("physical"), still=True) as (physical, _):
            runs = search.joined([(run.physical, run.size) for run in physical.ram], start, end)
            return search.find(runs, physical.fill, expression, limit)

    def watch(self, address: int, size: int = 8, *, pid: int | None = None, timeout: float | None = None, every: float = 0.001) -> Change:
        """Wait until something at a virtual address, up to a page, is other than it was, and return what it was and became.

        The machine runs on, and is looked at each `every` seconds: what changed and changed back between two looks is not seen. On the
        vm wall the page that was mapped there at first is watched. Raises WaitTimeout after `timeout` seconds, BadAddress, NotFound,
        GuestGone.
        """
        _range(address, size, PAGE)
        if not 0 < every <= 3600 or (timeout is not None and timeout < 0):
            raise InvalidSpec("every must be seconds, more than 0, and timeout 0 or more")
        with self._lookout(address, size, pid) as (look, foreign):
            deadline = None if timeout is None else time.monotonic() + timeout
            before = look()
            # The host's kernel has no event for a write to another process's memory.
            while (now := look()) == before:
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeout(f"nothing at {address:#x} changed in {timeout:g} s", machine=self._machine)
                foreign.wait(every)
            return Change(address, before, now)

    # -- what it means ----------------------------------------------------------------------------

    def processes(self) -> list[GuestProcess]:
        """Return the processes that the kernel has in its list, those of its own among them, read from outside of the machine.

        Raises NotFound for a kernel without symbols or types, BadAddress where the list leads nowhere, UnsupportedByWall.
        """
        port = self._need("kernel")
        kernel = self._kernel(port)
        with self._physical(port, still=True) as (physical, still):
            tables = self._tables(port, physical, still, None)
            return tasks.processes(tables, kernel, lambda top: _below(tables, physical, still, top))

    # -- inside -----------------------------------------------------------------------------------

    def _need(self, feature: str) -> MemoryPort:
        port = self._port()
        port.need(feature, self._machine)
        return port

    def _kernel(self, port: MemoryPort) -> Kernel:
        assert port.kernel is not None
        return port.kernel()

    @contextmanager
    def _physical(self, port: MemoryPort, *, still: bool) -> Iterator[tuple[Physical, Still]]:
        with port.hold(still) as held, Foreign(held.pid, self._machine) as foreign:
            yield Physical(foreign, held.ram, self._machine), held

    def _tables(self, port: MemoryPort, physical: Physical, still: Still, pid: int | None) -> Tables:
        """Return the page tables of the kernel, or of a process, of a machine that stands still."""
        kernel = self._kernel(port)
        top = kernel.symbols.get(_TOP, _TEXT) - _TEXT
        tables = Tables(physical.read, top or still.top, still.levels)
        banner = kernel.symbols.get("linux_banner", 0)
        try:
            moved = tables.read(banner, len(kernel.banner)) != kernel.banner
        except BadAddress:
            moved = True
        if moved:
            raise NotFound(
                "the machine's kernel is not where its image puts it",
                machine=self._machine,
                hint="wait until it has booted; KASLR must be off",
            )
        return tables if pid is None else _below(tables, physical, still, tasks.space_of(tables, kernel, pid))

    @contextmanager
    def _space(self, pid: int | None) -> Iterator[Space]:
        """Give one address space of a machine that stands still."""
        port = self._need("kernel" if pid is None else "process")
        if "kernel" in port.features:
            with self._physical(port, still=True) as (physical, still):
                yield Mapped(physical, self._tables(port, physical, still, pid))
        else:
            assert pid is not None
            with port.hold(True) as held, Foreign(local.find(held.pid, pid), self._machine) as foreign:
                yield Local(foreign)

    @contextmanager
    def _lookout(self, address: int, size: int, pid: int | None) -> Iterator[tuple[Callable[[], bytes], Foreign]]:
        """Give a way to read one range of a machine that runs on, and the process in which it is."""
        port = self._need("kernel" if pid is None else "process")
        with ExitStack() as stack:
            if "kernel" in port.features:
                with port.hold(True) as still:
                    foreign = stack.enter_context(Foreign(still.pid, self._machine))
                    physical = Physical(foreign, still.ram, self._machine)
                    spans = list(self._tables(port, physical, still, pid).spans(address, size))
                yield lambda: b"".join(physical.read(*span) for span in spans), foreign
            else:
                assert pid is not None
                with port.hold(False) as still:
                    foreign = stack.enter_context(Foreign(local.find(still.pid, pid), self._machine))
                yield lambda: foreign.read(address, size), foreign


def _below(tables: Tables, physical: Physical, still: Still, top: int) -> Tables:
    """Return the address space whose top table is at a virtual address of the kernel's."""
    page = tables.page(top)
    return Tables(physical.read, page.physical + top - page.virtual, still.levels)


def _range(address: int, size: int, most: int = 1 << 64) -> None:
    if not 0 <= address < 1 << 64 or not 0 < size <= most or address + size > 1 << 64:
        raise InvalidSpec(f"{size} bytes at {address:#x} are no range of memory", hint=f"from 1 to {most} bytes" if most < 1 << 64 else "")
