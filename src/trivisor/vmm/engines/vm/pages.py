"""RAM of a running QEMU on its way into a file of its own, with the machine standing still for as short as can be.

Its own pages (anonymous ones, as /proc/PID/pagemap tells) change under our hands, so they are taken while it stands still, into memory that
is there already, and written when it runs again. What it shares with the file that it was cloned from nobody can write: that part is
copied after. A machine whose RAM is a file in memory that is written through has no other pages than its own.

Zeros become holes, by blocks.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import EngineError
from trivisor.vmm.engines.vm import files
from trivisor.vos.memory.foreign import Foreign

_PAGE = mmap.PAGESIZE
_BLOCK = 16 * _PAGE
_ZEROS = bytes(_BLOCK)
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..(.)(.) ([0-9a-f]+) \S+ (\d+)")
_OWN = bytes(bool(high & 0xC0) and not high & 0x20 for high in range(256))
"""By the upper byte of a page's word: present or swapped out (bits 63, 62), and not of a file (61)."""
_THERE = bytes(bool(high & 0xC0) for high in range(256))
_BUFFER = 512 << 20
"""Bytes taken at a time; what does not fit is written while the machine stands still."""
_FEW = 16
"""Pages; fewer than that between two runs are taken along with them, and zeros are left out in blocks of so many: each run costs a call."""
_FAULT_IN = 23
"""madvise(2), MADV_POPULATE_WRITE."""
_SPARE = 16 << 20
"""What a machine may make its own until it stands still, without having to wait for memory then."""


@dataclass(frozen=True)
class _Behind:
    """What lies behind the machine's RAM: a file, or nothing. `shared`: what is written goes through to it."""

    file: int | None
    shared: bool


class Pages:
    """The `size` bytes from `address` on in a process, and the empty file `target` that they go to: before, take, after, in that order."""

    def __init__(self, foreign: Foreign, address: int, size: int, target: int, behind: _Behind) -> None:
        self._foreign = foreign
        self._address = address
        self._size = size
        self._target = target
        self._behind = behind
        self._buffer: mmap.mmap | None = None
        self._taken: list[tuple[int, int]] = []
        self._own = b""
        self.copied = self.written = 0

    def before(self) -> None:
        """While it runs: have memory ready for what is its own. Raises OSError."""
        os.ftruncate(self._target, self._size)
        wanted = min(self._find().count(1) * _PAGE + _SPARE, _BUFFER, self._size)
        self._buffer = mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # In a host that is a virtual machine itself huge pages are what its own host has taken back (free page reporting), and
        # 126 MB of them took 270 to 500 ms to have again; small ones take 40 to 50 anywhere, and huge ones at best 17.
        for advice in (mmap.MADV_NOHUGEPAGE, _FAULT_IN):
            with suppress(OSError):  # a kernel that does not know it: it takes longer then
                self._buffer.madvise(advice)

    def take(self) -> None:
        """While it stands still: take what is its own. Raises OSError, GuestGone, HostLacks."""
        assert self._buffer is not None
        room, filled = len(self._buffer), 0
        self._own = self._find()
        for low, high in _runs(self._own, 1):
            while low < high:
                part = min(high - low, room - filled)
                if not part:
                    self._read(filled)
                    self._write()
                    filled = 0
                    continue
                self._taken.append((low, part))
                filled += part
                low += part
        self._read(filled)

    def after(self) -> None:
        """When it may run again: write what was taken, and copy what it shares. Raises OSError."""
        self._write()
        self.close()
        if self._behind.file is not None and not self._behind.shared:
            for low, high in _runs(self._own, 0):
                self.copied += _copy(self._behind.file, self._target, low, high)

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _find(self) -> bytes:
        """Return a byte for each page: 1 if it is the machine's own, and so may change."""
        if self._behind.shared:
            assert self._behind.file is not None
            return _closed_up(_data(self._behind.file, self._size))
        length = self._size // _PAGE * 8
        with open(f"/proc/{self._foreign.pid}/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(self._address // _PAGE * 8)
            words = pagemap.read(length)
        if len(words) != length:
            raise OSError(errno.EIO, "the page map is cut short")
        return _closed_up(words[7::8].translate(_THERE if self._behind.file is None else _OWN))

    def _read(self, filled: int) -> None:
        """Fill the buffer with the runs that are noted."""
        assert self._buffer is not None
        with memoryview(self._buffer) as view:
            if self._behind.shared:
                assert self._behind.file is not None
                at = 0
                for low, size in self._taken:
                    at += _fill(self._behind.file, view[at : at + size], low)
                return
            wanted = [(self._address + low, size) for low, size in self._taken]
            if self._foreign.gather(view[:filled], wanted) != filled:
                raise OSError(errno.EFAULT, "a part of the machine's memory cannot be read")

    def _write(self) -> None:
        """Write the runs in the buffer."""
        assert self._buffer is not None
        with memoryview(self._buffer) as view:
            at = 0
            for low, size in self._taken:
                with view[at : at + size] as run:
                    for begin, end in _filled(run):
                        self.written += _put(self._target, run[begin:end], low + begin)
                at += size
        self._taken.clear()


@contextmanager
def opened(foreign: Foreign, address: int, size: int, target: int) -> Iterator[Pages]:
    """Find out what lies behind a part of a process's memory, and return its pages. Raises EngineError, StorageError."""
    with ExitStack() as stack:
        try:
            pages = Pages(foreign, address, size, target, _behind(stack, foreign.pid, address, size))
        except OSError as error:
            raise files.storage(error, "reading the machine's memory") from error
        try:
            yield pages
        finally:
            pages.close()


def _behind(stack: ExitStack, pid: int, address: int, size: int) -> _Behind:
    found = set()
    covered = 0
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if match := _MAP.match(line):
                low, high = max(int(match[1], 16), address), min(int(match[2], 16), address + size)
                if low < high:
                    covered += high - low
                    place = int(match[5], 16) + low - int(match[1], 16) - (low - address)
                    found.add((match[4] == "s", int(match[6]), place if match[6] != "0" else 0))
    if covered != size or len(found) != 1:
        raise EngineError("the machine's memory is not mapped as one piece")
    shared, inode, place = found.pop()
    if not inode:
        return _Behind(None, False)
    if place:
        raise EngineError("the machine's memory does not begin where its file does")
    return _Behind(_open(stack, pid, inode, size), shared)


def _open(stack: ExitStack, pid: int, inode: int, size: int) -> int:
    """Open the file that QEMU holds open under some number: it may have no name any more."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            seen = path.stat()
        except FileNotFoundError:
            continue
        if seen.st_ino == inode and seen.st_size >= size and path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd
    raise EngineError("QEMU has closed the file of the machine's memory")


def _runs(pages: bytes, kind: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) in bytes of each run of pages of that kind."""
    for run in re.finditer(b"\1+" if kind else b"\0+", pages):
        yield run.start() * _PAGE, run.end() * _PAGE


def _closed_up(pages: bytes) -> bytes:
    """Return the same with small gaps between runs filled."""
    return re.sub(b"(?<=\1)\0{1,%d}(?=\1)" % (_FEW - 1), lambda gap: b"\1" * len(gap[0]), pages)


def _filled(run: memoryview) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of what of `run` must be written: the blocks with something in them."""
    begin = -1
    for at in range(0, len(run), _BLOCK):
        with run[at : at + _BLOCK] as block:
            # Bytes are compared by memcmp(3), views by one byte after the other.
            empty = not any(block[:64]) and bytes(block) == _ZEROS[: len(block)]
        if not empty and begin < 0:
            begin = at
        elif empty and begin >= 0:
            yield begin, at
            begin = -1
    if begin >= 0:
        yield begin, len(run)


def segments(file: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the data of `file` between two places."""
    while low < high:
        try:
            begin = os.lseek(file, low, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if begin >= high:
            return
        low = min(os.lseek(file, begin, os.SEEK_HOLE), high)
        yield begin, low


def _data(file: int, size: int) -> bytes:
    found = bytearray(size // _PAGE)
    for begin, end in segments(file, 0, size):
        first, last = begin // _PAGE, -(-end // _PAGE)
        found[first:last] = b"\1" * (last - first)
    return bytes(found)


def _copy(source: int, target: int, low: int, high: int) -> int:
    copied = 0
    for begin, end in segments(source, low, high):
        files.copy_range(source, target, begin, end)
        copied += end - begin
    return copied


def _fill(file: int, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer):
        got = os.preadv(file, [buffer[done:]], offset + done)
        if not got:
            raise OSError(errno.EIO, "the machine's memory became shorter")
        done += got
    return done


def _put(file: int, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer):
        # Of a large piece the kernel keeps large pages, which a host that is a virtual machine itself may have to be given first.
        done += os.pwrite(file, buffer[done : done + _BLOCK], offset + done)
    return done
