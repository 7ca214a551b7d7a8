"""Running one command to its end: stdin in, output out, a timeout, and a kill if anything goes wrong on the way.

One loop in the caller's thread feeds stdin, takes output and runs the callbacks, so exceptions and Ctrl-C land where
they can be raised. Only a stdin that is neither bytes nor a regular file is read by a thread of its own: it may block.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from trivisor.core.errors import ExecTimeout, GuestError, GuestGone
from trivisor.core.units import format_size
from trivisor.vos.command import KILL_WAIT, Command
from trivisor.vos.wire import STDERR, STDOUT

Stdin = bytes | bytearray | memoryview | str | IO[bytes] | Iterable[bytes]
Sink = Callable[[bytes], object]
QUIET_WAKE = 64 * 1024
_READ = 256 * 1024
_CHANNELS = (STDOUT, STDERR)


class Capture:
    """Collects what one command writes, at most `limit` bytes of each channel."""

    def __init__(self, machine: str, limit: int, sinks: dict[int, Sink | None], hint: str = "") -> None:
        self.machine = machine
        self._killed: float | None = None
        self._hint = hint or "raise max_output, take the output as it comes with on_stdout, or use spawn"
        self.truncated = False
        self._limit = limit
        self._sinks = sinks
        self._kept: dict[int, list[bytes | memoryview]] = {STDOUT: [], STDERR: []}
        self._sizes = {STDOUT: 0, STDERR: 0}

    @property
    def quiet(self) -> bool:
        """True if nobody wants output before the end."""
        return not any(self._sinks.values())

    def output(self, channel: int) -> bytes:
        return b"".join(self._kept[channel])

    def run(self, command: Command, stdin: Stdin, timeout: float | None, deadline: float | None) -> None:
        """Return when the command has ended. On any failure, and Ctrl-C, it is killed first."""
        try:
            feed = Feed(command, stdin)
            while not command.over:
                if not command.wait(lambda: self._waiting(command) or feed.ready(), deadline):
                    self._kill(command, timeout or 0.0)
                self.collect(command)
                feed.step(deadline)
            self.collect(command)
            feed.check()
        except BaseException:
            command.abort(self._killed)
            raise
        command.check()

    def _waiting(self, command: Command) -> bool:
        return any(command.unread(channel) >= command.wake_size for channel in _CHANNELS)

    def collect(self, command: Command) -> None:
        """Take what the command has written, and give it to the callbacks."""
        for channel in _CHANNELS:
            chunks = command.take(channel)
            if not chunks:
                continue
            self._keep(channel, chunks)
            if (sink := self._sinks[channel]) is not None:
                sink(bytes(chunks[0]) if len(chunks) == 1 else b"".join(chunks))

    def _keep(self, channel: int, chunks: list[bytes | memoryview]) -> None:
        size = sum(map(len, chunks))
        if self._sizes[channel] + size <= self._limit:
            self._sizes[channel] += size
            self._kept[channel] += chunks
        elif self._sinks[channel] is not None:
            self.truncated = True
        else:
            raise GuestError(f"the command wrote more than {format_size(self._limit)}", machine=self.machine, hint=self._hint)

    def _kill(self, command: Command, timeout: float) -> None:
        """The timeout is over: kill the group, keep what still comes for a moment, raise ExecTimeout."""
        command.signal(9)
        self._killed = end = time.monotonic() + KILL_WAIT
        self._sinks = {STDOUT: None, STDERR: None}
        try:
            while not command.over and command.wait(lambda: self._waiting(command), end):
                self.collect(command)
            self.collect(command)
        except GuestGone:
            raise
        except GuestError:
            self.truncated = True  # more than is kept: what is kept goes with the error
        raise ExecTimeout(self.machine, timeout, self.output(STDOUT), self.output(STDERR))


class Feed:
    """Gives a command its stdin, as its window allows."""

    def __init__(self, command: Command, stdin: Stdin) -> None:
        self._command = command
        self._data = memoryview(b"")
        self._parts: Iterator[bytes] = iter(())
        self._error: BaseException | None = None
        self._done = False
        self._thread = False
        if isinstance(stdin, str):
            self._data = memoryview(stdin.encode())
        elif isinstance(stdin, bytes | bytearray | memoryview):
            self._data = memoryview(bytes(stdin))
            self._done = not self._data  # an empty stdin was asked for as no stdin
        else:
            self._parts = pieces(stdin)
            self._thread = not _regular(stdin)
        if self._thread:
            threading.Thread(target=self._run, name="stdin of a command", daemon=True).start()

    def ready(self) -> bool:
        if self._thread:
            return self._error is not None
        return not self._done and self._command.credit > 0

    def check(self) -> None:
        """Raise what reading stdin raised."""
        if self._error is not None:
            raise self._error

    def step(self, deadline: float | None) -> None:
        """Send a piece. Raises what reading stdin raises."""
        if self._thread:
            self.check()
            return
        if self._done or self._command.over or self._command.credit == 0:
            return
        if not self._data:
            self._data = memoryview(next(self._parts, b""))
            if not self._data:
                self._command.end_input()
                self._done = True
                return
        self._data = self._data[self._command.feed(self._data, deadline) :]

    def _run(self) -> None:
        try:
            for part in self._parts:
                self._command.write(memoryview(part))
            self._command.end_input()
        except (BrokenPipeError, GuestError):
            return  # the command ended without reading it all, or the line went: the caller sees that itself
        except BaseException as error:
            with self._command.changed:
                self._error = error
                self._command.changed.notify_all()


def pieces(source: IO[bytes] | Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of a binary file or an iterable, none empty."""
    if hasattr(source, "read"):
        # read1 gives what a pipe or terminal has now; read would wait for a whole buffer.
        read = getattr(source, "read1", source.read)
        while part := read(_READ):
            yield _checked(part)
    else:
        for part in source:
            if part:
                yield _checked(part)


def _checked(part: object) -> bytes:
    if isinstance(part, str):
        raise TypeError("stdin must give bytes, not str: open the file in binary mode")
    return bytes(part)  # type: ignore[call-overload, no-any-return]


def _regular(source: object) -> bool:
    try:
        return stat.S_ISREG(os.fstat(source.fileno()).st_mode)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
