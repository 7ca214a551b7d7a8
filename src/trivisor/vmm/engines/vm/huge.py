"""RAM in huge pages, for machines made with hugepages=. (Documentation/admin-guide/mm/hugetlbpage.rst and transhuge.rst.)

reserved     2 MiB pages that root has set aside (vm.nr_hugepages), in a memfd of the machine's own; all are taken when it starts, so
             that it never lacks one later. It is cloned from ice like any other machine, by a copy.
transparent  anonymous memory, which QEMU advises the kernel to have in huge pages as far as it finds some. What is mapped from ice is a
             file's and cannot be, so the machine is booted.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from pathlib import Path

from trivisor.core.errors import HostLacks, InvalidSpec
from trivisor.core.spec import Spec
from trivisor.core.units import MIB

SIZE = 2 * MIB
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def check(spec: Spec) -> None:
    """Raise InvalidSpec for memory that is no number of huge pages, HostLacks where there are not so many."""
    if spec.hugepages == "reserved":
        if spec.memory % SIZE:
            raise InvalidSpec(f"memory of {spec.memory} bytes is no whole number of huge pages of 2M", machine=spec.name)
        free = _number("free_hugepages") - _number("resv_hugepages")
        if free < spec.memory // SIZE:
            raise _short(spec.memory // SIZE, free)
    elif spec.hugepages == "transparent":
        try:
            said = re.search(r"\[(\w+)\]", _TRANSPARENT.read_text())
        except OSError:
            said = None
        if said is None or said[1] == "never":
            raise HostLacks("this host's kernel makes no huge pages by itself", hint=f"as root: echo madvise > {_TRANSPARENT}")


def reserve(fd: int, size: int) -> None:
    """Give a memfd of huge pages all of its pages. Raises HostLacks where there are not so many any more."""
    os.ftruncate(fd, size)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise _short(size // SIZE, _number("free_hugepages") - _number("resv_hugepages")) from error


def fill(source: int, target: int) -> None:
    """Copy the data of `source` into a memfd of huge pages, which can be mapped but not written to."""
    size = os.fstat(target).st_size
    with mmap.mmap(target, size) as mapped, memoryview(mapped) as view:
        at = 0
        while at < size:
            try:
                start = os.lseek(source, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = at = os.lseek(source, start, os.SEEK_HOLE)
            while start < end:
                done = os.preadv(source, [view[start : min(end, start + (64 << 20))]], start)
                if not done:
                    raise OSError(errno.EIO, "the file became shorter while it was copied")
                start += done


def _number(name: str) -> int:
    try:
        return int((_POOL / name).read_text())
    except (OSError, ValueError):
        return 0


def _short(pages: int, free: int) -> HostLacks:
    more = _number("nr_hugepages") + pages - max(0, free)
    return HostLacks(f"{pages} huge pages of 2M are needed, and {max(0, free)} are free", hint=f"as root: sysctl vm.nr_hugepages={more}")
