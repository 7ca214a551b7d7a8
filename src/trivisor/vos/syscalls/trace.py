"""Tracing: run a command and have its system calls as events, as they happen.

The tracer runs in the machine and stops the command's programs only at the calls that were asked for. Events come over a channel of
the command's own stream; a reader that is slow slows the command down, as a full pipe does. One that does not read for half
a minute loses events, and is told how many. After the command's first process has ended nothing more is recorded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from trivisor.core.errors import ExecTimeout, InvalidSpec, TrivisorError
from trivisor.launch import syscalls
from trivisor.vos.capture import Capture, Feed, Stdin
from trivisor.vos.command import Command
from trivisor.vos.syscalls.events import CallEvent, Event, LostEvent, error_name, quoted
from trivisor.vos.syscalls.records import Decoder
from trivisor.vos.wire import STDERR, STDOUT, TRACE, Exited

_REFUSED = 126
"""The exit status of a command that was never begun (guest/src/policy.c)."""
_CHUNK = 64 << 10
"""Bytes of records that are made into events at once."""


@dataclass(frozen=True)
class Filter:
    """Which events are kept. An empty condition holds for all; those about calls leave out events that are no calls."""

    calls: frozenset[str] = frozenset()
    pids: frozenset[int] = frozenset()
    """Processes or threads."""
    errors: frozenset[str] = frozenset()
    """Names of errnos: calls that failed with one of them."""
    failed: bool = False
    """Only calls that failed."""

    @classmethod
    def make(cls, calls: Iterable[str] = (), pids: Iterable[int] = (), errors: Iterable[str] = (), *, failed: bool = False) -> Filter:
        """Return a filter. Raises InvalidSpec for a call that there is not, or what is no errno's name."""
        names, codes = frozenset(calls), frozenset(errors)
        for name in names:
            syscalls.number(name)
        known = {error_name(number) for number in range(1, 517)}
        for code in codes - known:
            raise InvalidSpec(f"{code!r} is no errno", hint="for example ENOENT; errno(3) lists them")
        return cls(names, frozenset(pids), codes, failed)

    def keep(self, event: Event) -> bool:
        """Say whether `event` passes."""
        if isinstance(event, LostEvent):
            return True
        if self.pids and not self.pids & {event.pid, event.tid}:
            return False
        if not (self.calls or self.errors or self.failed):
            return True
        if not isinstance(event, CallEvent) or (self.calls and event.name not in self.calls):
            return False
        return event.error in self.errors if self.errors else bool(event.errno) or not self.failed


@dataclass
class Count:
    """What one call cost. Seconds from entry to exit, waiting included."""

    calls: int = 0
    errors: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass
class Summary:
    """Counts and time by call, as of `strace -c -w`."""

    calls: dict[str, Count] = field(default_factory=dict)
    lost: int = 0
    """Events that nobody read in time: what is counted here is so much too little."""

    def add(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, LostEvent):
            self.lost += event.count
        elif isinstance(event, CallEvent):
            count = self.calls.setdefault(event.name, Count())
            count.calls += 1
            count.errors += bool(event.errno)
            count.seconds += event.duration
            count.longest = max(count.longest, event.duration)

    def table(self) -> str:
        """Return a table as of strace -c: the costliest call first."""
        total = sum(count.seconds for count in self.calls.values())
        rows = ["% time     seconds  usecs/call     calls    errors syscall", " ".join("-" * width for width in (6, 11, 11, 9, 9, 16))]
        for name, count in sorted(self.calls.items(), key=lambda item: (-item[1].seconds, item[0])):
            share = 100 * count.seconds / total if total else 0.0
            each = round(count.seconds * 1e6 / count.calls)
            rows.append(f"{share:6.2f} {count.seconds:11.6f} {each:11d} {count.calls:9d} {count.errors or '':>9} {name}")
        all_calls, errors = (sum(getattr(count, of) for count in self.calls.values()) for of in ("calls", "errors"))
        rows += [rows[1], f"{100 if total else 0:6.2f} {total:11.6f} {'':>11} {all_calls:9d} {errors or '':>9} total"]
        return "\n".join(rows + ([f"{self.lost} events were lost"] if self.lost else []))

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON can hold it."""
        return {"calls": {name: vars(count) for name, count in self.calls.items()}, "lost": self.lost}


class Trace(Iterator[Event]):
    """A command that runs under a trace: an iterator over its events, in the order of their ends. At its end, how it went.

    Leaving the `with`, or close(), kills the command if it still runs.
    """

    def __init__(
        self,
        command: Command,
        argv: tuple[str, ...],
        capture: Capture,
        decoder: Decoder,
        keep: Filter,
        stdin: Stdin,
        timeout: float | None,
        refusal: Callable[[str], TrivisorError],
    ) -> None:
        """`refusal` makes the error of a command that could not be traced, of what the guest said."""
        self.argv = argv
        self.summary = Summary()
        """Of the events that came so far and passed the filter."""
        self._command = command
        self._capture = capture
        self._decoder = decoder
        self._keep = keep
        self._timeout = timeout
        self._refusal = refusal
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._events: deque[Event] = deque()
        self._ended = False
        self._feed = Feed(command, stdin)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """Return the next event.

        Raises ExecTimeout (the command is killed), UnsupportedByWall (the guest's kernel will not have it traced), GuestGone,
        GuestProtocolError, and what a callback raises.
        """
        try:
            while not self._events:
                if self._ended:
                    raise StopIteration
                self._step()
        except StopIteration:
            raise
        except BaseException:
            self._ended = True
            self._command.abort()
            raise
        return self._events.popleft()

    @property
    def exited(self) -> Exited | None:
        """How the command ended; None while it runs."""
        return self._command.exited

    @property
    def exit_code(self) -> int | None:
        """Its status, or 128 + n if signal n killed it; None while it runs."""
        return self._command.exited.exit_code if self._command.exited else None

    @property
    def pid(self) -> int | None:
        """Its pid in the machine, once it has started."""
        return self._command.pid

    @property
    def stdout(self) -> bytes:
        """What it wrote so far, as far as that is kept."""
        return self._capture.output(STDOUT)

    @property
    def stderr(self) -> bytes:
        """The same of stderr."""
        return self._capture.output(STDERR)

    def run(self) -> Summary:
        """Take all events that are left, and return the summary."""
        for _ in self:
            pass
        return self.summary

    def kill(self, signal: int = 9) -> None:
        """Send `signal` to the command's process group."""
        self._command.signal(signal)

    def close(self) -> None:
        """Kill it if it still runs."""
        self._ended = True
        self._command.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Trace of {quoted(self.argv[0])}>"

    # -- inside -----------------------------------------------------------------------------------

    def _step(self) -> None:
        """Wait for something, and take it."""
        command = self._command
        if not command.over and not command.wait(self._ready, self._deadline):
            command.abort()
            raise ExecTimeout(command.machine, self._timeout or 0.0, self.stdout, self.stderr)
        over = command.over
        self._capture.collect(command)
        if not over:
            self._feed.step(self._deadline)
        data = b"".join(command.take(TRACE, _CHUNK))
        for event in self._decoder.feed(data):
            if self._keep.keep(event):
                self.summary.add(event)
                self._events.append(event)
        if over and not command.unread(TRACE):
            self._ended = True
            command.check()
            self._feed.check()
            self._decoder.end()
            if not self._decoder.began and self.exit_code == _REFUSED:
                raise self._refusal(self.stderr.decode("utf-8", "replace").strip()[-200:])

    def _ready(self) -> bool:
        command = self._command
        return any(map(command.unread, (STDOUT, STDERR, TRACE))) or self._feed.ready()
