"""A child of the test under a filter of its own, whose listener the test gets: what a handler is tried against without a machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import socket
import struct
import sys
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


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.c_void_p))


def install(calls: Iterable[str]) -> int:
    """Put this process under a filter that has `calls` answered from outside, and return the listener."""
    numbers = [NUMBERS[name] for name in calls]
    code = struct.pack("<HBBI", 0x20, 0, 0, 0)
    for at, number in enumerate(numbers):
        code += struct.pack("<HBBI", 0x15, len(numbers) - at, 0, number)
    code += struct.pack("<HBBI", 6, 0, 0, _ALLOW) + struct.pack("<HBBI", 6, 0, 0, _NOTIFY)
    memory = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(memory))
    libc.prctl(38, 1, 0, 0, 0)
    fd = libc.syscall(NUMBERS["seccomp"], 1, _NEW_LISTENER | _WAIT_KILLABLE, ctypes.byref(program))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return fd


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
    """The child; `results` is what its function returned, as text."""

    pid: int
    pipe: int
    listener: DirectListener
    attachments: list[Attachment] = field(default_factory=list)

    def result(self, timeout: float = 20.0) -> str:
        """Wait for its end and return what its function returned, as repr."""
        deadline = time.monotonic() + timeout
        text = b""
        os.set_blocking(self.pipe, False)
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                part = os.read(self.pipe, 65536)
                if not part:
                    return text.decode()
                text += part
            time.sleep(0.001)
        raise TimeoutError(text.decode())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def trapped(calls: Iterable[str], function: Callable[[], object]) -> Iterator[Child]:
    """Fork a child that runs `function` under a filter on `calls`."""
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.close(read)
            fd = install(calls)
            socket.send_fds(theirs, [b"x"], [fd])
            os.close(fd)
            theirs.recv(1)
            os.write(write, repr(function()).encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            os._exit(0)
    theirs.close()
    os.close(write)
    with ours:
        fd = socket.recv_fds(ours, 1, 1)[1][0]
        child = Child(pid, read, DirectListener(fd, "test"))
        ours.send(b"g")
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            os.waitpid(pid, 0)
            os.close(read)


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
