"""A listener that is a descriptor of this process: the container wall.

A held call costs here poll, NOTIF_RECV and NOTIF_SEND, with SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP where the kernel has it
(6.6), which hands the processor to and fro: 6 us in all, against 40 without. A path adds process_vm_readv and
NOTIF_ID_VALID, 4 us; opening /proc/PID/mem instead costs 5. A read is checked after it: what was copied from a pid that had been
given to another process is thrown away. A write must not happen to the wrong process at all, so it goes through
/proc/PID/mem: opened, then checked, then written.

What several threads use at once (answers, reads beside the serving thread) shares no buffer: scratch memory is taken from
a list and put back, which is atomic, so no lock is on the way of a call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import Any

from trivisor.core.errors import BadArgument, CallGone, GuestError, GuestGone
from trivisor.vos.syscalls.attach import Attached, attach
from trivisor.vos.syscalls.behalf import Wish
from trivisor.vos.syscalls.listener import ID, NOTIFICATION, PID, Notification, Returned

_RECV, _SEND, _VALID, _ADDFD, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103, 0x40082104
_SYNC_WAKE_UP = 1
_ADD_SETFD, _ADD_SEND = 1, 2
_ZEROS = bytes(NOTIFICATION.size)
_RESPONSE = struct.Struct("<QqiI")
_ADDED = struct.Struct("<QIIII")
_ID = struct.Struct("<Q")
_VECTOR = struct.Struct("<QQQQ")
_PAGE = mmap.PAGESIZE
_SCRATCH = 64 << 10
_LISTENERS: weakref.WeakSet[DirectListener] = weakref.WeakSet()
_watch_forks = threading.Event()

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
_readv.restype = ctypes.c_ssize_t


class DirectListener:
    """A seccomp listener in this process; `attached`, where there is one, is the way to the answerer that lent it."""

    def __init__(self, fd: int, machine: str = "", attached: Attached | None = None) -> None:
        """Take over `fd` and `attached`."""
        self.machine = machine
        self.held: set[int] = set()
        self._fd = fd
        self._attached = attached
        self._marks: Any = [0, 0] if attached is None else attached.marks
        self._buffer = bytearray(NOTIFICATION.size)
        self._unpack = NOTIFICATION.unpack_from
        self._scratch = [_Scratch(_SCRATCH)]
        try:
            fcntl.ioctl(fd, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):  # before Linux 6.6
                raise
        _LISTENERS.add(self)
        if not _watch_forks.is_set():
            _watch_forks.set()
            os.register_at_fork(after_in_child=_forked)

    def fileno(self) -> int:
        return self._fd

    @property
    def connection(self) -> int | None:
        """Descriptor that is readable when `returned` may have something."""
        return None if self._attached is None else self._attached.fileno()

    def receive(self) -> Notification | None:
        buffer = self._buffer
        buffer[:] = _ZEROS  # the kernel refuses anything else
        try:
            fcntl.ioctl(self._fd, _RECV, buffer, True)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # it died, or was interrupted, before we looked
                return None
            raise GuestGone("the listener is closed", machine=self.machine) from error
        notification = self._unpack(buffer)
        marks = self._marks
        marks[0] = notification[0]
        if not self.held:
            marks[1] = notification[0]
        return notification

    def returned(self) -> list[Returned]:
        back: list[Returned] = []
        attached = self._attached
        if attached is None:
            return back
        try:
            for came in attached.take():
                if isinstance(came, Returned):
                    back.append(came)
                else:
                    self._finish(came.wish, came.errno, came.fd)
        except GuestError:
            for wish in attached.abandoned():
                self._finish(wish, errno.EPERM, None)
            raise
        return back

    def _finish(self, wish: Wish, code: int, fd: int | None) -> None:
        """Answer a call for which something has been done."""
        try:
            if wish.what == "P" and not code and fd is not None:
                self.give(wish.notification, fd, None, wish.cloexec, send=True)
            else:
                self.answer(wish.notification, 0, errno.EIO if wish.what == "P" and not code else code, 0)
        except CallGone:
            return
        except OSError as error:  # EMFILE: the program has no room for it
            self.answer(wish.notification, 0, error.errno or errno.EIO, 0)
        finally:
            self.held.discard(wish.notification[ID])
            if fd is not None:
                os.close(fd)

    # -- the program's memory ---------------------------------------------------------------------

    def valid(self, notification: Notification) -> bool:
        try:
            fcntl.ioctl(self._fd, _VALID, _ID.pack(notification[ID]))
        except (OSError, ValueError):  # ValueError: closed meanwhile
            return False
        return True

    def read(self, notification: Notification, address: int, size: int) -> bytes:
        return self._copied(notification, address, size, string=False) if size else b""

    def string(self, notification: Notification, address: int, most: int) -> bytes | None:
        raw = self._copied(notification, address, most, string=True)
        if raw[-1:] == b"\0":
            return raw[:-1]
        if len(raw) < most:
            raise BadArgument(errno.EFAULT, f"the string at {address:#x} has no end", machine=self.machine)
        return None

    def _copied(self, notification: Notification, address: int, size: int, string: bool) -> bytes:
        """Copy up to `size` bytes; of a string no more than its NUL."""
        try:
            scratch = self._scratch.pop() if size <= _SCRATCH else _Scratch(size)
        except IndexError:  # another thread has it
            scratch = _Scratch(_SCRATCH)
        got = scratch.copy(notification[PID], address, size)
        code = ctypes.get_errno() if got < 0 else 0
        data = b"" if got <= 0 else scratch.text(got) if string else scratch.view[:got].tobytes()
        if size <= _SCRATCH:
            self._scratch[:] = (scratch,)
        if not self.valid(notification):
            raise CallGone("the program has gone", machine=self.machine)
        if got > 0:
            return data
        if code == errno.ESRCH:
            raise CallGone("the program has gone", machine=self.machine)
        if code in (errno.EFAULT, 0):
            raise BadArgument(errno.EFAULT, f"nothing can be read at {address:#x}", machine=self.machine)
        raise OSError(code, f"cannot read the memory of process {notification[PID]}: {os.strerror(code)}")

    def write(self, notification: Notification, address: int, data: bytes) -> None:
        if not data:
            return
        if address >= 1 << 63:
            raise BadArgument(errno.EFAULT, f"nothing can be written at {address:#x}", machine=self.machine)
        try:
            memory = os.open(f"/proc/{notification[PID]}/mem", os.O_WRONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise CallGone("the program has gone", machine=self.machine) from error
        try:
            if not self.valid(notification):
                raise CallGone("the program has gone", machine=self.machine)
            done = os.pwrite(memory, data, address)
        except OSError as error:
            raise BadArgument(errno.EFAULT, f"nothing can be written at {address:#x}", machine=self.machine) from error
        finally:
            os.close(memory)
        if done < len(data):
            raise BadArgument(errno.EFAULT, f"nothing can be written at {address + done:#x}", machine=self.machine)

    def link(self, notification: Notification, name: str) -> str:
        try:
            return os.readlink(f"/proc/{notification[PID]}/{name}")  # noqa: PTH115 (a Path would normalise what is no path)
        finally:
            if not self.valid(notification):
                raise CallGone("the program has gone", machine=self.machine)

    # -- answers ----------------------------------------------------------------------------------

    def answer(self, notification: Notification, value: int, error: int, flags: int) -> bool:
        try:
            fcntl.ioctl(self._fd, _SEND, _RESPONSE.pack(notification[0], value, -error, flags))
        except OSError as failure:
            if failure.errno in (errno.ENOENT, errno.EINPROGRESS):
                return False
            raise
        except ValueError:  # closed meanwhile
            return False
        return True

    def give(self, notification: Notification, source: bytes | int, number: int | None, cloexec: bool, send: bool) -> int:
        own = _sealed(source) if isinstance(source, bytes) else source
        flags = (_ADD_SETFD if number is not None else 0) | (_ADD_SEND if send else 0)
        request = bytearray(_ADDED.pack(notification[ID], flags, own, number or 0, os.O_CLOEXEC if cloexec else 0))
        try:
            added: int = fcntl.ioctl(self._fd, _ADDFD, request, True)
            return added
        except ValueError as error:
            raise CallGone("the listener is closed", machine=self.machine) from error
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise CallGone("the program has gone", machine=self.machine) from error
            if error.errno == errno.EINVAL and send:  # ADDFD_SEND came with Linux 5.14
                given = self.give(notification, own, number, cloexec, send=False)
                self.answer(notification, given, 0, 0)
                return given
            raise
        finally:
            if own is not source:
                os.close(own)

    # -- the answerer's part ----------------------------------------------------------------------

    def hand_off(self, notification: Notification, back: bool) -> None:
        self._answerer().hand_off(NOTIFICATION.pack(*notification), back)

    def behalf(self, wish: Wish) -> None:
        self.held.add(wish.notification[ID])
        try:
            self._answerer().ask(wish)
        except BaseException:
            self.held.discard(wish.notification[ID])
            raise

    def _answerer(self) -> Attached:
        if self._attached is None:
            raise OSError(errno.ENOTCONN, "this listener belongs to no machine's answerer")
        return self._attached

    def close(self) -> None:
        """Close all, in a forked child, too: or the answerer would not see that their owner has died."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._attached is not None:
            self._attached.close()


class _Scratch:
    """Memory to copy into, with its two iovec arrays: of ours, and of the program's, split where its first page ends.

    process_vm_readv promises partial copies only between elements (process_vm_readv(2)): so a string that ends before an
    unmapped page is read.
    """

    def __init__(self, size: int) -> None:
        self._memory = ctypes.create_string_buffer(size)
        self.view = memoryview(self._memory).cast("B")
        self._ours = bytearray(16)
        self._theirs = bytearray(_VECTOR.size)
        self._ours_at = ctypes.addressof(ctypes.c_char.from_buffer(self._ours))
        self._theirs_at = ctypes.addressof(ctypes.c_char.from_buffer(self._theirs))
        self._memory_at = ctypes.addressof(self._memory)

    def text(self, got: int) -> bytes:
        """Return what was copied, up to and with its first NUL."""
        text = self._memory.value  # up to the first NUL, which may be an earlier copy's
        return text + b"\0" if len(text) < got else self.view[:got].tobytes()

    def copy(self, pid: int, address: int, size: int) -> int:
        first = min(size, _PAGE - address % _PAGE)
        struct.pack_into("<QQ", self._ours, 0, self._memory_at, size)
        _VECTOR.pack_into(self._theirs, 0, address, first, (address + first) % (1 << 64), size - first)
        got: int = _readv(pid, self._ours_at, 1, self._theirs_at, 2 if size > first else 1, 0)
        return got


def _sealed(content: bytes) -> int:
    """Return a descriptor, open for reading, of a file that holds `content` and can never hold anything else."""
    made = os.memfd_create("content", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(made, rest) :]
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        return os.open(f"/proc/self/fd/{made}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(made)


def dial(socket_path: Path, token: bytes, machine: str, timeout: float = 6.0) -> DirectListener:
    """Borrow the listener that bears `token` from the machine's answerer. Raises GuestGone, or GuestError if it does not come."""
    fd, attached = attach(socket_path, token, machine, timeout)
    try:
        return DirectListener(fd, machine, attached)
    except BaseException:
        os.close(fd)
        attached.close()
        raise


def _forked() -> None:
    for listener in list(_LISTENERS):
        listener.close()
