"""The binary records of a trace (guest/PROTOCOL.md, "Trace"), and the words that ask for it.

Which arguments the tracer copies is decided here, from the table of calls, and goes along with each call's number: the tracer knows
no call by name. Records come from a machine that may be hostile: every length, number and kind is checked, and what does not fit
raises GuestProtocolError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from trivisor.core.errors import GuestProtocolError
from trivisor.launch import syscalls
from trivisor.vos import wire
from trivisor.vos.syscalls.decode import STRUCTS, address, fields
from trivisor.vos.syscalls.events import CallEvent, Event, ExecEvent, ExitEvent, LostEvent, NewEvent, SignalEvent, StopEvent, Value
from trivisor.vos.syscalls.flags import FLAGS, flags
from trivisor.vos.syscalls.table import Argument, signature

VERSION: Final = 1
RECORD_MAX: Final = 64 << 10
CALLS_MAX: Final = 1024
PID_MAX: Final = 1 << 22
"""PID_MAX_LIMIT: no Linux has greater ones."""
BUFFER_MAX: Final = 4096
_NAME_MAX = 64
_HEAD = struct.Struct("<BIIQ")
_CALL = struct.Struct("<QBIq6QB")
_COPY = struct.Struct("<BBBI")
_CUT, _FAULT = 1, 2
_SIGNED = frozenset({"int", "fd", "dirfd", "pid", "sig"})
_STRINGS = {"path": "s", "str": "s", "strings": "v"}
_IGNORED = ("envp",)
"""Vectors that are not copied: an environment is long, and holds what is nobody's business."""


def trace_words(calls: Iterable[str], mode: str, machine: str = "", *, buffer: int = 64) -> tuple[str, ...]:
    """Return the operation `trace` for these calls; none: all that there are.

    `mode` is how they are stopped at: filter (the command's filter says so), stops, all. `buffer`: bytes copied of a buffer at most.
    """
    known = syscalls.table(machine)
    names = list(calls) or list(known)
    return ("trace", mode, f"bytes={min(buffer, BUFFER_MAX)}", *(_word(known[name], name) for name in names if name in known))


def _word(number: int, name: str) -> str:
    copies = [copy for argument in signature(name).arguments if (copy := _copied(argument))]
    return str(number) + (":" + ",".join(copies) if copies else "")


def _copied(argument: Argument) -> str:
    kind, at, length = argument.kind, argument.index, argument.length
    plain = kind.removesuffix("_out")
    if kind in _STRINGS:
        return "" if argument.name in _IGNORED else f"{at}{_STRINGS[kind]}"
    if kind == "out":
        return f"{at}B"
    if kind in ("in", "sockaddr", "sockaddr_out"):
        return f"{at}{ {'in': 'b', 'sockaddr': 'a', 'sockaddr_out': 'A'}[kind] }{length}"
    if plain in STRUCTS:
        return f"{at}{'f' if kind == plain else 'F'}{STRUCTS[plain].size}"
    return ""


class Decoder:
    """Makes events of the bytes of channel TRACE, as they come. `machine` is the guest's architecture, "" the host's."""

    def __init__(self, machine: str = "") -> None:
        self._names: Mapping[int, str] = syscalls.names(machine)
        self._machine = machine
        self._rest = b""
        self._offset: int | None = None
        self._kinds: Mapping[int, Callable[[int, int, int, wire.Reader], Event]] = {
            1: self._call, 2: self._signal, 3: self._exit, 4: self._new, 5: self._exec, 6: self._stop, 7: self._lost,
        }  # fmt: skip

    @property
    def began(self) -> bool:
        """Whether the first record, which a tracer writes once it holds the command, has come."""
        return self._offset is not None

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that `data` completes. Raises GuestProtocolError for what is none."""
        view = memoryview(self._rest + data)
        events: list[Event] = []
        at = 0
        while len(view) - at >= 4:
            size = int.from_bytes(view[at : at + 4], "little")
            if not _HEAD.size <= size <= RECORD_MAX:
                raise GuestProtocolError(f"a record of a trace has {size} bytes")
            if len(view) - at < 4 + size:
                break
            event = self._record(view[at + 4 : at + 4 + size])
            at += 4 + size
            if event is not None:
                events.append(event)
        self._rest = bytes(view[at:])
        return events

    def end(self) -> None:
        """Raise GuestProtocolError if a record was cut short."""
        if self._rest:
            raise GuestProtocolError(f"a trace ends within a record, after {len(self._rest)} bytes")

    def _record(self, record: memoryview) -> Event | None:
        reader = wire.Reader(record)
        kind, pid, tid, at = _HEAD.unpack(reader.take(_HEAD.size))
        if max(pid, tid) > PID_MAX:
            raise GuestProtocolError(f"a record of a trace is about thread {tid} of process {pid}")
        if kind == 0:
            self._hello(at, reader)
            return None
        if self._offset is None:
            raise GuestProtocolError("a trace begins without its first record")
        make = self._kinds.get(kind)
        if make is None:
            raise GuestProtocolError(f"a record of a trace is of kind {kind}")
        event = make(at + self._offset, pid, tid, reader)
        reader.done()
        return event

    def _hello(self, at: int, reader: wire.Reader) -> None:
        version, wall = reader.u32(), reader.u64()
        reader.done()
        if version != VERSION or self._offset is not None:
            raise GuestProtocolError("a trace begins twice" if version == VERSION else f"a trace of version {version}, {VERSION} is known")
        self._offset = wall - at

    # -- kinds ------------------------------------------------------------------------------------

    def _call(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        took, state, number, result, *rest = _CALL.unpack(reader.take(_CALL.size))
        registers, count = rest[:6], rest[6]
        if number >= CALLS_MAX or state > 1 or count > 6:
            raise GuestProtocolError(f"a record of call {number} with {count} copies")
        name = self._names.get(number, f"syscall_{number}")
        copies = dict(self._copy(reader) for _ in range(count))
        known = signature(name).arguments
        args, cut = {}, set()
        for argument in known:
            copied = copies.get(argument.index)
            args[argument.name] = self._value(argument, registers[argument.index], copied)
            if copied and copied[1] & _CUT:
                cut.add(argument.name)
        return CallEvent(
            at=at,
            pid=pid,
            tid=tid,
            name=name,
            nr=number,
            args=args,
            cut=frozenset(cut),
            result=None if state else result,
            duration=took / 1e9,
        )

    def _copy(self, reader: wire.Reader) -> tuple[int, tuple[str, int, bytes]]:
        at, kind, marks, size = _COPY.unpack(reader.take(_COPY.size))
        if at > 5 or chr(kind) not in "svbBaAfF" or marks > (_CUT | _FAULT):
            raise GuestProtocolError(f"a copy of argument {at} of kind {kind}")
        return at, (chr(kind), marks, bytes(reader.take(size)))

    def _value(self, argument: Argument, register: int, copied: tuple[str, int, bytes] | None) -> Value:
        kind = argument.kind
        if copied is not None and not (copied[1] & _FAULT and not copied[2]):
            return _decoded(kind.removesuffix("_out"), copied[0], copied[2], register)
        if kind in FLAGS:
            return flags(kind, register & 0xFFFFFFFF if kind not in ("CLONE",) else register, self._machine or "x86_64")
        if kind in _SIGNED:
            low = register & 0xFFFFFFFF
            return low - (1 << 32) if low & 0x80000000 else low
        if kind == "int64":
            return register - (1 << 64) if register >> 63 else register
        return register & 0xFFFFFFFF if kind in ("mode", "uid") else register

    def _signal(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        number, code, sender = reader.u32(), reader.u32(), reader.u32()
        return SignalEvent(at=at, pid=pid, tid=tid, signal=_signal(number), code=code - (1 << 32) if code >> 31 else code, sender=sender)

    def _stop(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        return StopEvent(at=at, pid=pid, tid=tid, signal=_signal(reader.u32()))

    def _exit(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        how, value = reader.u8(), reader.u32()
        if how > 1 or value > 255:
            raise GuestProtocolError(f"a thread ended with how={how} value={value}")
        return ExitEvent(at=at, pid=pid, tid=tid, status=0 if how else value, signal=_signal(value) if how else None)

    def _new(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        child, thread = reader.u32(), reader.u32()
        if max(child, thread) > PID_MAX:
            raise GuestProtocolError(f"a new thread {thread} of process {child}")
        return NewEvent(at=at, pid=pid, tid=tid, child=child, thread=thread)

    def _exec(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        former, name = reader.u32(), reader.string()
        if len(name) > _NAME_MAX:
            raise GuestProtocolError(f"a command's name has {len(name)} bytes")
        return ExecEvent(at=at, pid=pid, tid=tid, command=wire.text(name), former=former)

    def _lost(self, at: int, pid: int, tid: int, reader: wire.Reader) -> Event:
        return LostEvent(at=at, pid=pid, tid=tid, count=reader.u64())


def _signal(number: int) -> int:
    if not 1 <= number <= wire.MAX_SIGNAL:
        raise GuestProtocolError(f"a trace tells of signal {number}")
    return number


def _decoded(kind: str, copied: str, data: bytes, register: int) -> Value:
    """Return what was copied as what it is; the pointer, if it is not that."""
    if copied == "s":
        return wire.text(data)
    if copied == "v":
        return tuple(wire.text(word) for word in data.split(b"\0")[:-1])
    try:
        if copied in "aA":
            return address(data[:128])
        if copied in "fF":
            return fields(kind, data)
    except (ValueError, KeyError):
        return register
    return data
