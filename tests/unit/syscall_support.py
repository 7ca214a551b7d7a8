"""A child of the test under a filter of its own, whose listener the test gets: what a handler is tried against without a machine."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from trivisor.launch.syscalls import SYSCALLS
from trivisor.vos.syscalls.direct import DirectListener
from trivisor.vos.syscalls.supervisor import Attachment, Supervisor

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
NUMBERS = SYSCALLS[platform.machine()]
_NEW_LISTENER, _WAIT_KILLABLE = 8, 32
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_FD, _GO, _DONE, _TEXT = 0, 1, 2, 3


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.c_void_p))


def install(calls: Iterable[str]) -> int:
    """Put this process under a filter that has `calls` answered from outside, and return the listener."""
    numbers = [NUMBERS[name] for name in calls]
    code = struct.pack("<HBBI", 0x20, 0, 0, 0)
    for at, number in enumerate(numbers):
        code += struct.pack("<HBBI", 0x15, len(numbers) - at, 0, number)
    code += struct.pack("<HBBI", 6, 0, 0, _ALLOW) + struct.pack("<HBBI", 6, 0, 0, _NOTIFY)
    return confine(code, _NEW_LISTENER | _WAIT_KILLABLE)


def confine(code: bytes, flags: int = 0) -> int:
    """Put this thread under a filter for good; what seccomp(2) returns."""
    memory = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(memory))
    libc.prctl(38, 1, 0, 0, 0)
    done: int = libc.syscall(NUMBERS["seccomp"], 1, flags, ctypes.byref(program))
    if done < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return done


def call(name: str, *args: object) -> int:
    """Make a system call; what it returns, or minus its errno."""
    ctypes.set_errno(0)
    done: int = libc.syscall(ctypes.c_long(NUMBERS[name]), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    return -ctypes.get_errno() if done == -1 and ctypes.get_errno() else done


@dataclass(frozen=True)
class On:
    """A handler as a policy keeps it."""

    calls: tuple[str, ...]
    function: Callable[..., object]
    timeout: float = 5.0
    enforces: bool = False


@dataclass
class Child:
    """The child. It talks to the test through shared memory alone: any call of its own may be held."""

    pid: int
    shared: mmap.mmap
    listener: DirectListener
    attachments: list[Attachment] = field(default_factory=list)

    def result(self, timeout: float = 30.0) -> str:
        """Wait until its function has returned, and return what, as repr."""
        deadline = time.monotonic() + timeout
        while not self.shared[_DONE]:
            over = time.monotonic() > deadline or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if over and not self.shared[_DONE]:  # it ends as soon as it is done, maybe since we looked
                raise TimeoutError("the child has not finished")
            time.sleep(0.001)
        return self.shared[_TEXT:].split(b"\0", 1)[0].decode()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _run(shared: mmap.mmap, calls: Iterable[str], function: Callable[[], object]) -> None:
    """The child's part."""
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    shared[_FD] = install(calls)
    while not shared[_GO]:
        os.sched_yield()
    os.close(shared[_FD])
    try:
        text = repr(function())
    except BaseException:
        text = traceback.format_exc()
    raw = text.encode()[: len(shared) - _TEXT - 1]
    shared[_TEXT : _TEXT + len(raw)] = raw
    shared[_DONE] = 1


@contextlib.contextmanager
def trapped(calls: Iterable[str], function: Callable[[], object]) -> Iterator[Child]:
    """Fork a child that runs `function` under a filter on `calls`."""
    shared = mmap.mmap(-1, 1 << 16)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _run(shared, calls, function)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        deadline = time.monotonic() + 30
        while not shared[_FD]:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        pidfd = os.pidfd_open(pid)
        fd = libc.syscall(NUMBERS["pidfd_getfd"], pidfd, int(shared[_FD]), 0)
        os.close(pidfd)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        child = Child(pid, shared, DirectListener(fd, "test"))
        shared[_GO] = 1
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def answered(
    function: Callable[[], object], *handlers: On, extra: Iterable[str] = (), **options: object
) -> Iterator[tuple[Child, Attachment]]:
    """The same with `handlers` attached; calls of `extra` are held, too."""
    calls = {name for handler in handlers for name in handler.calls} | set(extra)
    supervisor = Supervisor("test", **{k: v for k, v in options.items() if k == "patience"})  # type: ignore[arg-type]
    refused = options.get("refused")
    with trapped(sorted(calls), function) as child:
        attachment = supervisor.attach(child.listener, handlers, refused=refused)  # type: ignore[arg-type]
        try:
            yield child, attachment
        finally:
            supervisor.close()
