"""Copying much of another process's memory, most of which it has never touched.

To read a page through process_vm_readv(2) is to touch it: the process gets a page table for it, and a hole of a file in memory
becomes a page. So what the process has pages of its own for (/proc/PID/pagemap) is read so; the rest is what lies in the file behind
it, holes left out, or zeros. Where the kernel does not let us open that file (it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE), all
of it is read the plain way.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from trivisor.vos.memory.foreign import Foreign

_PAGE = mmap.PAGESIZE
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ (\d+)")


@dataclass(frozen=True)
class _Area:
    """A part of one mapping, and where it lies in the file behind it, if there is one."""

    start: int
    end: int
    offset: int
    file: int | None


def into(foreign: Foreign, buffer: memoryview, address: int) -> int:
    """Fill `buffer`, which is all zeros, from `address` on; return how many bytes could be read. Raises GuestGone, HostLacks."""
    end = address + len(buffer)
    if address % _PAGE or end % _PAGE:
        return foreign.into(buffer, address)
    with ExitStack() as stack:
        try:
            there = _there(foreign.pid, address, end)
            areas = list(_areas(stack, foreign.pid, address, end))
            for area in areas:
                if area.file is not None:
                    for low, high in _absent(there, address, area):
                        _from_file(area.file, buffer[low - address : high - address], area.offset + low - area.start)
        except OSError:  # it is not for us to look at, or the process has ended
            return foreign.into(buffer, address)
    if sum(area.end - area.start for area in areas) != len(buffer):
        return foreign.into(buffer, address)
    for run in re.finditer(b"\1+", there):
        low, high = run.start() * _PAGE, run.end() * _PAGE
        got = foreign.into(buffer[low:high], address + low)
        if got != high - low:
            return low + got
    return len(buffer)


def _there(pid: int, address: int, end: int) -> bytes:
    """Return a byte for each page: 1 if the process has it, 0 if not."""
    words = array("Q")
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // _PAGE * 8)
        data = pagemap.read((end - address) // _PAGE * 8)
    if len(data) != (end - address) // _PAGE * 8:
        raise OSError(errno.EIO, "the page map is cut short")
    words.frombytes(data)
    return bytes([word >> 62 != 0 for word in words])


def _areas(stack: ExitStack, pid: int, address: int, end: int) -> Iterator[_Area]:
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            found = _MAP.match(line)
            if not found:
                continue
            start, stop = int(found[1], 16), int(found[2], 16)
            low, high = max(start, address), min(stop, end)
            if low >= high:
                continue
            file = None
            if found[4] != "0":
                file = os.open(f"/proc/{pid}/map_files/{start:x}-{stop:x}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, file)
            yield _Area(low, high, int(found[3], 16) + low - start, file)


def _absent(there: bytes, address: int, area: _Area) -> Iterator[tuple[int, int]]:
    first = (area.start - address) // _PAGE
    for run in re.finditer(b"\0+", there[first : (area.end - address) // _PAGE]):
        yield area.start + run.start() * _PAGE, area.start + run.end() * _PAGE


def _from_file(file: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with what the file has there; holes, and what is behind its end, stay zeros."""
    at = 0
    while at < len(buffer):
        try:
            data = os.lseek(file, offset + at, os.SEEK_DATA) - offset
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return
            raise
        if data >= len(buffer):
            return
        hole = min(os.lseek(file, offset + data, os.SEEK_HOLE) - offset, len(buffer))
        while data < hole:
            got = os.preadv(file, [buffer[data:hole]], offset + data)
            if not got:
                return
            data += got
        at = hole
