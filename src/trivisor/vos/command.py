"""One command's stream: what it wrote and is not read yet, what it still takes, how it ended.

The line's reader stores frames here; callers wait on `changed`. What a command may leave here unread is bounded by its
windows, 256 KiB a channel; WINDOW is granted as callers take it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from trivisor.core.errors import ExecTimeout, GuestError, GuestGone, GuestProtocolError, WaitTimeout
from trivisor.vos import wire
from trivisor.vos.line import Line
from trivisor.vos.syscalls.supervisor import step_aside
from trivisor.vos.wire import STDERR, STDIN, STDOUT, TRACE, Exited, Type

_GRANT = wire.WINDOW // 2
_BATCH = 8 * wire.DATA_MAX
"""Bytes of stdin in one send."""
KILL_WAIT = 5.0
"""Seconds until a command that was killed must have ended; after that it is left behind."""


class _Output:
    """What one channel brought."""

    def __init__(self) -> None:
        self.chunks: deque[bytes | memoryview] = deque()
        self.size = 0
        self.window = wire.WINDOW
        self.taken = 0
        self.ended = False


class Command:
    """A command under way. Thread-safe."""

    def __init__(self, line: Line, *, traced: bool = False) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.pid: int | None = None
        self.exited: Exited | None = None
        self.error: GuestError | None = None
        self.wake_size = 1
        """Waiters are woken for output once this much is unread."""
        self._line = line
        self._outputs = {channel: _Output() for channel in ((STDOUT, STDERR, TRACE) if traced else (STDOUT, STDERR))}
        self._credit = wire.WINDOW
        self._abandoned = False
        self._waiters = 0
        self._stream = 0

    @classmethod
    def start(cls, line: Line, request: bytes, deadline: float | None, wake_size: int = 1, *, traced: bool = False) -> Command:
        """Send an EXEC request. Does not wait for an answer. Only a command that is `traced` may send records of a trace."""
        step_aside()  # a handler of system calls that waits for a machine must not be waited for by its programs
        command = cls(line, traced=traced)
        command.wake_size = wake_size
        command._stream = line.open(command)
        line.send(wire.exec_frames(command._stream, request), deadline)
        return command

    # -- called by the line's reader --------------------------------------------------------------

    def frame(self, kind: int, payload: memoryview) -> bool:
        if kind == Type.DATA:
            self._data(payload)
        elif kind == Type.EXITED:
            exited = wire.parse_exited(payload)
            with self.changed:
                self.exited = exited
                self.changed.notify_all()
            return True
        elif kind == Type.WINDOW:
            self._granted(*wire.parse_window(payload))
        elif kind == Type.STARTED:
            self._started(wire.parse_started(payload))
        elif kind == Type.ERROR:
            code, message = wire.parse_error(payload)
            why = os.strerror(code)
            said = message if message.endswith(why) else f"{message}: {why}" if message else why
            # It powers off: a moment later nothing would answer at all.
            kind_of = GuestGone if code == errno.ESHUTDOWN else GuestError
            self.lost(kind_of(said, machine=self._line.machine))
            return True
        else:
            raise GuestProtocolError(f"a frame of type {kind:#04x} on the stream of a command")
        return False

    def lost(self, error: GuestError) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def _started(self, pid: int) -> None:
        with self.changed:
            if self.pid is not None:
                raise GuestProtocolError("a command started twice")
            self.pid = pid
            if self._waiters and self.wake_size == 1:
                self.changed.notify_all()

    def _granted(self, channel: int, more: int) -> None:
        with self.changed:
            if channel != STDIN or self._credit + more > wire.WINDOW:
                raise GuestProtocolError(f"WINDOW gives {more} bytes on channel {channel}")
            self._credit += more
            if self._waiters:
                self.changed.notify_all()

    def _data(self, payload: memoryview) -> None:
        output = self._outputs.get(payload[0]) if payload else None
        if output is None:
            raise GuestProtocolError("DATA on a channel that is not the guest's")
        size = len(payload) - 1
        with self.changed:
            if output.ended or size > output.window:
                raise GuestProtocolError("DATA after its end" if output.ended else "DATA beyond its window")
            output.window -= size
            if size == 0:
                output.ended = True
            elif not self._abandoned:
                output.chunks.append(bytes(payload[1:]))
                output.size += size
            if self._waiters and (output.size >= self.wake_size or (size == 0 and self.wake_size == 1)):
                self.changed.notify_all()

    # -- called by whoever runs the command -------------------------------------------------------

    @property
    def machine(self) -> str:
        """The machine's name, for messages."""
        return self._line.machine

    @property
    def over(self) -> bool:
        """True once no frame will come any more."""
        return self.exited is not None or self.error is not None

    @property
    def reachable(self) -> bool:
        """True if it has not ended, as far as is known, and this process can speak to it."""
        return not (self.over or self._line.foreign or self._line.closed)

    def wait(self, ready: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until `ready()` or the end; False once `deadline` (monotonic) has passed, even for one who is always ready."""
        self._check_process()
        with self.changed:
            while not self.over:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if ready():
                    return True
                if self._line.closed:
                    self._line.check()
                self._waiters += 1
                try:
                    self.changed.wait(left)
                finally:
                    self._waiters -= 1
            return True

    def check(self) -> None:
        """Raise what ended the stream other than the command's own end."""
        if self.error is not None:
            error = self.error
            raise type(error)(error.message, machine=error.machine or self._line.machine, hint=error.hint)

    def unread(self, channel: int) -> int:
        return self._outputs[channel].size

    def at_end(self, channel: int) -> bool:
        """True if nothing is unread and nothing will come."""
        output = self._outputs[channel]
        return output.size == 0 and (output.ended or self.over)

    def take(self, channel: int, most: int | None = None) -> list[bytes | memoryview]:
        """Return what is unread on `channel`, at most `most` bytes, and let the command send as much more."""
        self._check_process()
        output = self._outputs[channel]
        with self.changed:
            if output.size == 0:
                return []
            if most is None or most >= output.size:
                taken, size = list(output.chunks), output.size
                output.chunks.clear()
            else:
                taken, size = _split(output.chunks, most), most
            output.size -= size
            output.taken += size
            grant = output.taken if output.taken >= _GRANT and not (output.ended or self.over) else 0
            if grant:
                output.taken = 0
                output.window += grant
        if grant and not self._line.closed:
            self._line.post(wire.window(self._stream, channel, grant))
        return taken

    def take_line(self, channel: int, most: int) -> bytes:
        """Return what is unread up to and with the first newline, at most `most` bytes; without a newline, all of it."""
        self._check_process()
        with self.changed:
            size = 0
            for chunk in self._outputs[channel].chunks:
                at = bytes(chunk).find(b"\n")
                size += len(chunk) if at < 0 else at + 1
                if at >= 0 or size >= most:
                    break
        return b"".join(self.take(channel, min(size, most)))

    @property
    def credit(self) -> int:
        """Bytes of stdin that the command takes now."""
        return self._credit

    def feed(self, data: memoryview, deadline: float | None) -> int:
        """Send the beginning of `data` to stdin, as much as the window allows; return how much."""
        self._check_process()
        with self.changed:
            size = min(len(data), self._credit, _BATCH)
            self._credit -= size
        buffers: list[bytes | memoryview] = []
        for at in range(0, size, wire.DATA_MAX):
            part = data[at : min(at + wire.DATA_MAX, size)]
            buffers += (wire.data_head(self._stream, STDIN, len(part)), part)
        if buffers:
            self._line.send(buffers, deadline)
        return size

    def write(self, data: memoryview, deadline: float | None = None) -> None:
        """Send all of `data` to stdin. Raises BrokenPipeError if the command ends first, WaitTimeout at `deadline`."""
        while data:
            if not self.wait(lambda: self._credit > 0, deadline):
                raise WaitTimeout("the command does not read its stdin", machine=self.machine)
            self.check()
            if self.exited is not None:
                raise BrokenPipeError(errno.EPIPE, "the command has ended")
            data = data[self.feed(data, deadline) :]

    def end_input(self) -> None:
        """Send the end of stdin."""
        if not self.over:
            self._line.post(wire.data_head(self._stream, STDIN, 0))

    def signal(self, number: int, *, group: bool = True) -> None:
        """Send a signal; nothing happens if the command has ended."""
        if not self.over:
            self._line.post(wire.frame(Type.SIGNAL, self._stream, number.to_bytes(4, "little") + bytes([group])))

    def resize(self, rows: int, columns: int) -> None:
        if not self.over:
            self._line.post(wire.frame(Type.RESIZE, self._stream, rows.to_bytes(2, "little") + columns.to_bytes(2, "little")))

    def started(self, timeout: float) -> int:
        """Wait until the command has started and return its pid there. Raises ExecTimeout after `timeout` seconds."""
        if not self.wait(lambda: self.pid is not None, time.monotonic() + timeout):
            self.abort()
            raise ExecTimeout(self._line.machine, timeout)
        self.check()
        return self.pid or 0

    def abort(self, deadline: float | None = None) -> None:
        """Kill the command's group, throw away what it writes, wait a little for its end, at most until `deadline`.

        Raises nothing of the guest's.
        """
        if deadline is None:
            deadline = time.monotonic() + KILL_WAIT
        try:
            if not self._line.closed:
                self.signal(9)
            while not self.over and self.wait(lambda: any(map(self.unread, self._outputs)), deadline):
                for channel in self._outputs:
                    self.take(channel)
        except GuestError:
            return  # the line went; so do its commands
        finally:
            self.abandon()

    def leave(self) -> None:
        """Kill it if it still runs, and forget its output."""
        if self.over:
            self.abandon()
        else:
            self.abort()

    def abandon(self) -> None:
        """Keep nothing of what may still come. The stream's number stays taken until the command ends."""
        if self._line.foreign:
            return
        with self.changed:
            self._abandoned = True
            for output in self._outputs.values():
                output.chunks.clear()
                output.size = 0

    def _check_process(self) -> None:
        if self._line.foreign:
            self._line.check()


def _split(chunks: deque[bytes | memoryview], most: int) -> list[bytes | memoryview]:
    """Take exactly `most` bytes off the front of `chunks`, which hold more."""
    taken: list[bytes | memoryview] = []
    while most:
        first = memoryview(chunks[0])
        if len(first) > most:
            taken.append(first[:most])
            chunks[0] = first[most:]
            break
        taken.append(chunks.popleft())
        most -= len(first)
    return taken
