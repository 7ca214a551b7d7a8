"""A trace as a file for ui.perfetto.dev: the JSON trace-event format, which chrome://tracing and speedscope read, too.

Calls are slices on the track of their thread, signals and ends are instants, programs name their processes. Times are
microseconds from the first event.
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import IO, Self

from trivisor.vos.syscalls.events import CallEvent, Event, ExecEvent, LostEvent, NewEvent, SignalEvent, StopEvent, text, to_dict


class Perfetto:
    """Writes events to a text file as they come; the file is whole after `close`, or the `with`."""

    def __init__(self, file: IO[str]) -> None:
        """`file` stays open, and is the caller's to close."""
        self._file = file
        self._first: int | None = None
        self._began = False
        self._closed = False

    def add(self, event: Event) -> None:
        """Write one event."""
        if self._first is None:
            self._first = event.at
        base = {"pid": event.pid, "tid": event.tid, "ts": (event.at - self._first) / 1000}
        match event:
            case CallEvent():
                said = to_dict(event)
                args = {key: said[key] for key in ("args", "result", "error")}
                self._put({"ph": "X", "cat": "syscall", "name": event.name, "dur": event.duration * 1e6, "args": args, **base})
            case ExecEvent():
                self._put({"ph": "M", "name": "process_name", "pid": event.pid, "args": {"name": to_dict(event)["command"]}})
            case LostEvent():
                self._put({"ph": "i", "s": "g", "cat": "trace", "name": f"{event.count} events lost", **base})
            case NewEvent() if event.child == event.thread:
                self._put({"ph": "i", "s": "t", "cat": "process", "name": f"new process {event.child}", **base})
            case NewEvent():
                self._put({"ph": "i", "s": "t", "cat": "process", "name": f"new thread {event.thread}", **base})
            case SignalEvent() | StopEvent():
                self._put({"ph": "i", "s": "t", "cat": "signal", "name": _bare(event), **base})
            case _:
                self._put({"ph": "i", "s": "t", "cat": "process", "name": _bare(event), **base})

    def close(self) -> None:
        """Finish the file."""
        if not self._closed:
            self._closed = True
            self._file.write("\n]}\n" if self._began else '{"traceEvents":[]}\n')

    def _put(self, value: dict[str, object]) -> None:
        self._file.write(("," if self._began else '{"displayTimeUnit":"ns","traceEvents":[') + "\n")
        self._began = True
        self._file.write(json.dumps(value, separators=(",", ":")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _bare(event: Event) -> str:
    """What text() says, without whose it is and its dashes."""
    return text(event).partition("] ")[2].strip("-+ ")
