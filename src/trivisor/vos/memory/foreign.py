"""The memory of another process of this host: process_vm_readv(2) and process_vm_writev(2).

It takes the right to trace that process: root has it, and whoever owns the user namespace that the process is in. The process may change
what is read while it is read; who wants it to stand still stops it first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from trivisor.core.errors import BadAddress, GuestGone, HostLacks

_libc = ctypes.CDLL(None, use_errno=True)
_VECTOR = ctypes.c_ulong * 2
_PARTS = 512
"""Of one call; the kernel takes up to 1024 (UIO_MAXIOV)."""
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    _call.restype = ctypes.c_ssize_t


class Foreign:
    """One process, held by a descriptor so that a later one with its number is not taken for it. A context manager."""

    def __init__(self, pid: int, machine: str = "") -> None:
        """Raises GuestGone if there is no such process."""
        self.pid = pid
        self._machine = machine
        try:
            self._fd = os.pidfd_open(pid)
        except OSError as error:
            raise self._gone() from error

    def into(self, buffer: memoryview, address: int) -> int:
        """Fill `buffer` from `address` on; return how many bytes could be read. Raises GuestGone, HostLacks."""
        return self._move(_libc.process_vm_readv, buffer, address)

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes. Raises BadAddress, GuestGone, HostLacks."""
        data = bytearray(size)
        done = self.into(memoryview(data), address)
        if done != size:
            raise BadAddress(f"nothing can be read at {address + done:#x}", machine=self._machine)
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data`. Raises BadAddress, after the part before it has been written; GuestGone, HostLacks."""
        done = self._move(_libc.process_vm_writev, memoryview(bytearray(data)), address)
        if done != len(data):
            raise BadAddress(f"nothing can be written at {address + done:#x}", machine=self._machine)

    def gather(self, buffer: memoryview, parts: Sequence[tuple[int, int]]) -> int:
        """Fill `buffer` from many (address, size), in order; return how many bytes could be read."""
        done = 0
        for first in range(0, len(parts), _PARTS):
            chosen = parts[first : first + _PARTS]
            wanted = sum(size for _, size in chosen)
            theirs = (ctypes.c_ulong * (2 * len(chosen)))(*(word for part in chosen for word in part))
            got = self._call(_libc.process_vm_readv, buffer[done : done + wanted], theirs, len(chosen))
            done += got
            if got != wanted:
                break
        return done

    def wait(self, seconds: float) -> None:
        """Wait that long. Raises GuestGone as soon as the process has ended."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if poll.poll(seconds * 1000):
            raise self._gone()

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _move(self, call: Any, buffer: memoryview, address: int) -> int:
        done = 0
        # One call moves at most 2 GiB, and ends at the first page that is not there.
        while done < len(buffer):
            got = self._call(call, buffer[done:], _VECTOR(address + done, len(buffer) - done), 1)
            if got == 0:
                break
            done += got
        return done

    def _call(self, call: Any, buffer: memoryview, theirs: ctypes.Array[ctypes.c_ulong], count: int) -> int:
        if not len(buffer):
            return 0
        ours = _VECTOR(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
        got = int(call(self.pid, ours, 1, theirs, count, 0))
        if got >= 0:
            return got
        code = ctypes.get_errno()
        if code == errno.EFAULT:
            return 0
        if code == errno.ESRCH:
            raise self._gone()
        raise HostLacks(
            f"the memory of process {self.pid} cannot be reached: {os.strerror(code)}",
            machine=self._machine,
            hint="it takes the right to trace the machine's processes (ptrace(2)): root, or whoever started the machine",
        )

    def _gone(self) -> GuestGone:
        return GuestGone("the process whose memory it is has ended", machine=self._machine)
