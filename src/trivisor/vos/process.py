"""A spawned command: its pipes as Python files, its end, its terminal's size."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from signal import SIGKILL
from types import TracebackType
from typing import Self

from trivisor.core.errors import WaitTimeout
from trivisor.vos.command import Command
from trivisor.vos.wire import STDERR, STDOUT, Exited

_LINE_MAX = 64 << 20


class Input(io.RawIOBase):
    """The stdin of a command: a binary file to write. `write` waits while the command does not read."""

    def __init__(self, command: Command) -> None:
        super().__init__()
        self._command = command

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, timeout: float | None = None) -> int:  # type: ignore[override]
        """Write all of `data`. Raises BrokenPipeError if the command has ended, WaitTimeout (a TimeoutError) after `timeout` seconds."""
        if self.closed:
            raise ValueError("stdin is closed")
        whole = bytes(data)  # what is queued must not change under us
        self._command.write(memoryview(whole), _deadline(timeout))
        return len(whole)

    def close(self) -> None:
        """Send the end of file."""
        if not self.closed:
            super().close()
            self._command.end_input()

    def __del__(self) -> None:
        """Being forgotten is not an end of file: the command may live on."""


class Output(io.RawIOBase):
    """One output of a command: a binary file to read."""

    def __init__(self, command: Command, channel: int) -> None:
        super().__init__()
        self._command = command
        self._channel = channel

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, timeout: float | None = None) -> bytes:
        """Return at least one and at most `size` bytes as soon as there are some, b"" at the end; without `size`, all to the end.

        Raises WaitTimeout (a TimeoutError) after `timeout` seconds, GuestGone or GuestProtocolError if the line fails.
        """
        deadline = _deadline(timeout)
        if size is not None and size >= 0:
            return self._some(size, deadline)
        parts = []
        while part := self._some(None, deadline):
            parts.append(part)
        return b"".join(parts)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        part = self.read(len(view))
        view[: len(part)] = part
        return len(part)

    def readall(self) -> bytes:
        return self.read()

    def readline(self, size: int | None = -1, timeout: float | None = None) -> bytes:
        """Return the next line with its newline; without one at the end of the file, or after `size` bytes."""
        deadline = _deadline(timeout)
        most = _LINE_MAX if size is None or size < 0 else size
        line = bytearray()
        while len(line) < most:
            self._ready(deadline)
            taken = self._command.take_line(self._channel, most - len(line))
            line += taken
            if not taken or taken.endswith(b"\n"):
                break
        return bytes(line)

    def _some(self, size: int | None, deadline: float | None) -> bytes:
        if size == 0:
            return b""
        self._ready(deadline)
        return b"".join(self._command.take(self._channel, size))

    def _ready(self, deadline: float | None) -> None:
        """Wait for bytes or the end."""
        if self.closed:
            raise ValueError("the output is closed")
        command = self._command
        if command.unread(self._channel):
            return
        if not command.wait(lambda: command.unread(self._channel) > 0 or command.at_end(self._channel), deadline):
            raise WaitTimeout("the command wrote nothing in the time given", machine=command.machine)
        if not command.unread(self._channel):
            command.check()


class Process:
    """A command that runs in the machine. As a context manager it is killed at the end if it still runs.

    Output that nobody reads stops the command after 256 KiB, as a full pipe does.
    """

    def __init__(self, command: Command, argv: tuple[str, ...], pid: int, *, pty: bool, starved: Callable[[], bool] | None = None) -> None:
        self._command = command
        self._starved = starved
        self.argv = argv
        self.pid = pid
        """Its pid in the machine."""
        self.pty = pty
        self.stdin = Input(command)
        self.stdout = Output(command, STDOUT)
        self.stderr = Output(command, STDERR)
        """Empty with a pty: stdout carries everything."""

    def poll(self) -> int | None:
        """Return the exit code if the command has ended: its status, or 128 + n if signal n killed it."""
        exited = self._command.exited
        return None if exited is None else exited.exit_code

    @property
    def reachable(self) -> bool:
        """True if it has not ended, as far as is known, and this process (not the parent that it was forked from) can speak to it."""
        return self._command.reachable

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises WaitTimeout (a TimeoutError) after `timeout` seconds; the command runs on."""
        if not self._command.over and not self._command.wait(_never, _deadline(timeout)):
            raise WaitTimeout(f"the command still runs after {timeout:g} s", machine=self._command.machine)
        if self._command.exited is None:
            self._command.check()
        return self.poll() or 0

    @property
    def exited(self) -> Exited | None:
        """How it ended, with its signal and what it used; None while it runs."""
        return self._command.exited

    @property
    def signal(self) -> int | None:
        """The signal that killed it, if one did."""
        return None if self._command.exited is None else self._command.exited.signal

    def out_of_memory(self) -> bool:
        """Say whether it was killed (SIGKILL), and the machine's memory ran out since it was started. False while it runs."""
        return self.poll() == 128 + SIGKILL and self._starved is not None and self._starved()

    def kill(self, signal: int = 9, *, group: bool = True) -> None:
        """Send `signal` to its process group, or to the process alone."""
        self._command.signal(int(signal), group=group)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self._command.resize(rows, columns)

    def close(self) -> None:
        """Kill it if it still runs, and forget its output."""
        self._command.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _never() -> bool:
    return False


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
