"""Joining the caller's terminal to a command's: raw mode, size changes, and the terminal as it was at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType

from trivisor.core.errors import TrivisorError
from trivisor.vos.process import Process

_PIECE = 64 * 1024
_ENDED, _RESIZED = b"e", b"r"


def size_of(fd: int) -> tuple[int, int]:
    """Return (rows, columns) of the terminal at `fd`; 24 by 80 where it has none (ioctl_tty(2), TIOCGWINSZ)."""
    try:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    except OSError:
        return 24, 80
    return (rows, columns) if rows and columns else (24, 80)


def attach(process: Process, stdin_fd: int = 0, stdout_fd: int = 1) -> int:
    """Carry bytes between the caller's terminal and `process`, which has a pty, until it ends; return its exit code.

    Keys such as Ctrl-C go to the command. The terminal is put back whatever happens. Raises GuestGone if the line fails.
    """
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    failures: list[BaseException] = []
    output = threading.Thread(target=_output, args=(process, stdout_fd, wake_write, failures), name="terminal", daemon=True)
    try:
        with _raw(stdin_fd), _resizing(stdout_fd, wake_write):
            process.resize(*size_of(stdout_fd))
            output.start()
            _input(process, stdin_fd, stdout_fd, wake_read)
            output.join(5.0)
        if failures:
            raise failures[0]
        return process.wait(5.0)
    finally:
        if output.is_alive():
            process.close()
            output.join(5.0)
        os.close(wake_read)
        os.close(wake_write)


def _input(process: Process, fd: int, screen: int, wake: int) -> None:
    """Feed the command, and pass on sizes of `screen`, until `wake` says that the output has ended."""
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    poller.register(fd, select.POLLIN)
    while True:
        ready = [at for at, _ in poller.poll()]
        if wake in ready:
            said = os.read(wake, _PIECE)
            if _ENDED in said:
                return
            process.resize(*size_of(screen))
        if fd not in ready:
            continue
        part = os.read(fd, _PIECE)
        if not part:
            process.stdin.close()
            poller.unregister(fd)
            continue
        try:
            process.stdin.write(part)
        except BrokenPipeError:
            poller.unregister(fd)  # it has ended; the last of its output is on the way


def _output(process: Process, fd: int, wake: int, failures: list[BaseException]) -> None:
    try:
        while part := process.stdout.read(_PIECE):
            while part:
                part = part[os.write(fd, part) :]
        process.wait()
    except (OSError, TrivisorError) as error:
        failures.append(error)
    finally:
        os.write(wake, _ENDED)


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Raw mode for as long as it lasts; nothing happens to what is no terminal."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _resizing(screen: int, wake: int) -> Iterator[None]:
    """Tell `wake` of changes of the terminal's size. Signals can be handled in the main thread only.

    The handler does nothing more: it may have interrupted a write that holds the lock it would need.
    """
    if not os.isatty(screen) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def changed(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # enough is waiting there already
            os.write(wake, _RESIZED)

    before = signal.signal(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
