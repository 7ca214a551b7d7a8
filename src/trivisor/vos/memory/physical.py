"""Guest-physical memory of a virtual machine: where its bytes are in the process that runs it.

Memory begins at 0. On a machine with more than some 2.8 GiB it has a hole below 4 GiB, for devices, and the rest of it above. What a
machine was given while it ran is a run of its own, further up.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from trivisor.core.errors import BadAddress, GuestProtocolError, HostLacks, InvalidSpec
from trivisor.vos.memory import resident
from trivisor.vos.memory.foreign import Foreign
from trivisor.vos.ports import Ram


class Physical:
    """One machine's memory. Reads what there is at the moment of each call."""

    def __init__(self, foreign: Foreign, ram: Sequence[Ram], machine: str = "") -> None:
        self.ram = tuple(ram)
        self._foreign = foreign
        self._machine = machine

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes. Raises BadAddress if not all of them are memory."""
        return self._foreign.read(self.where(address, size), size)

    def write(self, address: int, data: bytes) -> None:
        """Write `data`. Raises BadAddress if not all of it goes to memory; then nothing is written."""
        self._foreign.write(self.where(address, len(data)), data)

    def fill(self, address: int, buffer: memoryview) -> int:
        """Fill `buffer` from an address on, all of which is memory; return how many bytes could be read."""
        return self._foreign.into(buffer, self.where(address, len(buffer)))

    def gather(self, buffer: memoryview, spans: Sequence[tuple[int, int]]) -> None:
        """Fill `buffer` from (address, size) after another. Raises BadAddress."""
        if self._foreign.gather(buffer, [(self.where(address, size), size) for address, size in spans]) != len(buffer):
            raise BadAddress("a part of its memory cannot be read", machine=self._machine)

    def where(self, address: int, size: int) -> int:
        """Return where a range begins in the process that runs the machine."""
        for run in self.ram:
            if run.physical <= address and address + size <= run.physical + run.size:
                return run.address + address - run.physical
        runs = ", ".join(f"{run.physical:#x} to {run.physical + run.size:#x}" for run in self.ram)
        raise BadAddress(f"{size} bytes at the physical address {address:#x} are not memory", machine=self._machine, hint=f"it has {runs}")

    def copy(self, address: int, size: int) -> View:
        """Return a copy of a range. Raises BadAddress."""
        begin = self.where(address, size)
        data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = View(address, data)
        if resident.into(self._foreign, view.data, begin) != size:
            view.close()
            raise BadAddress("a part of its memory cannot be read", machine=self._machine)
        return view

    def mapped(self, address: int) -> bool:
        """Whether an address lies in the file that may be mapped, where there is one."""
        return not any(run.private for run in self.ram if 0 <= address - run.physical < run.size)

    def map(self, file: Path, address: int, size: int) -> View:
        """Return a range as it is, in the file that the runs of memory lie in. Raises BadAddress, InvalidSpec, HostLacks."""
        self.where(address, size)
        if address % mmap.ALLOCATIONGRANULARITY:
            raise InvalidSpec(f"shared memory is mapped by pages, and {address:#x} is not where one begins", hint="give a multiple of 4096")
        offset = 0
        for run in self.ram:
            if run.physical <= address < run.physical + run.size:
                offset += address - run.physical
                break
            offset += run.size
        try:
            fd = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise HostLacks(
                f"the machine's RAM cannot be opened: {error.strerror}",
                machine=self._machine,
                hint="it takes the right to trace the machine's process (ptrace(2)): root, or whoever started the machine",
            ) from error
        try:
            if not _sealed(fd, sum(run.size for run in self.ram if not run.private)):
                raise GuestProtocolError("the machine's process has put something else in the place of its RAM", machine=self._machine)
            return View(address, mmap.mmap(fd, size, flags=mmap.MAP_SHARED, offset=offset))
        finally:
            os.close(fd)


def _sealed(fd: int, size: int) -> bool:
    """Whether it is a file in memory of that size that nobody can make shorter: what is mapped from one that is kills who looks."""
    try:
        return os.fstat(fd).st_size == size and bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


class View:
    """Bytes of memory as a buffer: `data`, the k-th of which lies at the address `start + k`. A context manager.

    Whatever takes a buffer takes `data`: bytes(), struct, re, numpy.frombuffer. It must have let go of it when the view is closed.
    """

    def __init__(self, start: int, mapping: mmap.mmap) -> None:
        self.start = start
        self.data = memoryview(mapping)
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self.data)

    def close(self) -> None:
        """Give the memory back. Raises BufferError while something else still has the buffer."""
        self.data.release()
        self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
