"""What a trace tells: one value an event, and the line of text or JSON that says it.

All that is in them came out of a machine, whose programs may be hostile: whatever is printed is quoted, and nothing is taken for
more than data.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar

from trivisor.vos.syscalls.decode import Address
from trivisor.vos.syscalls.flags import Flags
from trivisor.vos.syscalls.table import signature

Value = int | str | bytes | Address | Flags | Mapping[str, int | str] | tuple[str, ...]
"""An argument: a path or another string is text, a buffer bytes, what could not be read the number it was."""

_RESTARTS = {512: "ERESTARTSYS", 513: "ERESTARTNOINTR", 514: "ERESTARTNOHAND", 516: "ERESTART_RESTARTBLOCK"}
_POINTERS = frozenset({"mmap", "brk", "mremap", "shmat"})
"""Calls that return an address."""
_SHOWN = 64
"""Characters of a buffer in a line of text; paths are shown whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `at` is nanoseconds since the epoch, by the machine's clock when the trace began, going on evenly."""

    KIND: ClassVar[str] = ""

    at: int
    pid: int
    """The process, as it is numbered in the machine; 0 if the event is nobody's."""
    tid: int
    """The thread: the process's number, for its first one."""

    @property
    def time(self) -> float:
        """Seconds since the epoch."""
        return self.at / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEvent(Event):
    """A system call, from its entry (`at`) to its exit."""

    KIND: ClassVar[str] = "call"

    name: str
    nr: int
    args: Mapping[str, Value]
    """By the names that the man page has."""
    cut: frozenset[str] = frozenset()
    """Arguments of which only the beginning was copied."""
    result: int | None
    """What it returned, the errno of one that failed negative; None: its thread ended within it."""
    duration: float
    """Seconds."""

    @property
    def errno(self) -> int:
        """Why it failed; 0 if it did not."""
        return -self.result if self.result is not None and -4096 < self.result < 0 else 0

    @property
    def error(self) -> str:
        """The errno's name, "" if it did not fail."""
        return error_name(self.errno)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalEvent(Event):
    """A signal is about to be delivered. `sender` is a pid, 0 if no process sent it."""

    KIND: ClassVar[str] = "signal"

    signal: int
    code: int
    sender: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEvent(Event):
    """A thread was stopped by a signal (SIGSTOP, SIGTSTP ...)."""

    KIND: ClassVar[str] = "stop"

    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitEvent(Event):
    """A thread ended, by itself with `status` or killed by `signal`."""

    KIND: ClassVar[str] = "exit"

    status: int
    signal: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent(Event):
    """A thread made another, or a process: a thread if `child` differs from `thread`."""

    KIND: ClassVar[str] = "new"

    child: int
    """The process that the new thread belongs to."""
    thread: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecEvent(Event):
    """A process runs another program, `command` for short. `former` is the thread that executed it, and now is the process's first."""

    KIND: ClassVar[str] = "exec"

    command: str
    former: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LostEvent(Event):
    """So many events were not kept: nobody read them for half a minute."""

    KIND: ClassVar[str] = "lost"

    count: int


# -- as text --------------------------------------------------------------------------------------


def text(event: Event) -> str:
    """Return `event` as strace would write it, without its newline. Printable whatever the machine sent."""
    where = f"[{event.pid}] " if event.pid == event.tid else f"[{event.pid}/{event.tid}] "
    match event:
        case CallEvent():
            return where + _call(event)
        case SignalEvent():
            sender = f" from {event.sender}" if event.sender else ""
            return f"{where}--- {signal_name(event.signal)}{sender} ---"
        case StopEvent():
            return f"{where}--- stopped by {signal_name(event.signal)} ---"
        case ExitEvent():
            how = f"exited with {event.status}" if event.signal is None else f"killed by {signal_name(event.signal)}"
            return f"{where}+++ {how} +++"
        case NewEvent():
            what = "process" if event.child == event.thread else "thread"
            return f"{where}+++ new {what} {event.thread} +++"
        case ExecEvent():
            return f"{where}+++ runs {quoted(event.command)} +++"
        case LostEvent():
            return f"!!! {event.count} events lost: nobody read them !!!"
    raise TypeError(f"{event!r} is no event of a trace")


def error_name(number: int) -> str:
    """Return the name of an errno, the kernel's inner ones too; "" for 0."""
    return "" if number == 0 else errno.errorcode.get(number) or _RESTARTS.get(number, f"E{number}")


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def quoted(value: str | bytes, most: int | None = None) -> str:
    """Return `value` in double quotes, with what is not printable escaped as in C."""
    chars = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    shown = "".join(map(_escape, chars if most is None else chars[:most]))
    return f'"{shown}"' + ("..." if most is not None and len(chars) > most else "")


_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def _escape(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _call(event: CallEvent) -> str:
    kinds = {argument.name: argument.kind for argument in signature(event.name).arguments}
    given = event.args
    opened = given.get("flags")
    if kinds.get("flags") == "OPEN" and "mode" in given and isinstance(opened, Flags) and not {"O_CREAT", "O_TMPFILE"} & set(opened):
        given = {name: value for name, value in given.items() if name != "mode"}  # it means nothing then (open(2))
    args = ", ".join(_shown(kinds.get(name, ""), value) + ("..." if name in event.cut else "") for name, value in given.items())
    return f"{event.name}({args}) = {_result(event)} <{event.duration:.6f}>"


def _result(event: CallEvent) -> str:
    if event.result is None:
        return "?"
    if code := event.errno:
        return f"-1 {error_name(code)} ({os.strerror(code)})" if code < 512 else f"? {error_name(code)}"
    return hex(event.result & 0xFFFFFFFFFFFFFFFF) if event.name in _POINTERS else str(event.result)


def _shown(kind: str, value: Value) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bytes):
        return quoted(value, _SHOWN)
    if isinstance(value, Address):
        return f"{{{value.family} {quoted(str(value))}}}"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name}={quoted(part) if isinstance(part, str) else part}" for name, part in value.items())
        return f"{{{inner}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(quoted, value))}]"
    return _number(kind, value)


def _number(kind: str, value: int) -> str:
    if isinstance(value, Flags):
        return str(value)
    if kind == "dirfd" and value == -100:
        return "AT_FDCWD"
    if kind == "mode":
        return f"0{value & 0xFFFFFFFF:o}" if value else "0"
    if kind == "sig":
        return signal_name(value)
    if kind in ("fd", "dirfd", "int", "int64", "size", "pid", "uid"):
        return str(value)
    return hex(value) if value > 9 else str(value) if value or kind in ("uint", "dev") else "NULL"


# -- as JSON --------------------------------------------------------------------------------------


def to_dict(event: Event) -> dict[str, object]:
    """Return `event` as JSON can hold it: bytes and paths as text (what is no UTF-8 as \\xNN), flags by name, errors by name."""
    found: dict[str, object] = {"event": event.KIND}
    found |= {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    if isinstance(event, CallEvent):
        found["error"] = event.error
    return found


def to_json(event: Event) -> str:
    """Return `event` as one line of JSON, without its newline."""
    return json.dumps(to_dict(event), separators=(",", ":"))


def _plain(value: object) -> object:
    if isinstance(value, Flags):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if is_dataclass(value):  # an Address
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.name != "raw"}
    if isinstance(value, frozenset | tuple):
        return [_plain(part) for part in sorted(value)] if isinstance(value, frozenset) else [_plain(part) for part in value]
    return value
