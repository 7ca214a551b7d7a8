"""Records of a trace made into events, and events into text, JSON, Perfetto and counts; whatever a hostile guest sends."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.core.errors import GuestProtocolError, InvalidSpec
from trivisor.launch import syscalls
from trivisor.vos import wire
from trivisor.vos.syscalls.decode import Address
from trivisor.vos.syscalls.events import CallEvent, Event, ExecEvent, ExitEvent, LostEvent, NewEvent, SignalEvent, StopEvent, text, to_json
from trivisor.vos.syscalls.perfetto import Perfetto
from trivisor.vos.syscalls.records import RECORD_MAX, Decoder, trace_words
from trivisor.vos.syscalls.trace import Filter, Summary

NR = syscalls.table("x86_64")


def record(kind: int, body: bytes = b"", pid: int = 10, tid: int = 10, at: int = 1000) -> bytes:
    whole = struct.pack("<BIIQ", kind, pid, tid, at) + body
    return struct.pack("<I", len(whole)) + whole


HELLO = record(0, struct.pack("<IQ", 1, 5_000_000_000), 0, 0, 0)


def call(
    name: str,
    args: Sequence[int] = (),
    result: int = 0,
    copies: Sequence[tuple[int, str, int, bytes]] = (),
    state: int = 0,
    took: int = 1500,
) -> bytes:
    body = struct.pack("<QBIq6QB", took, state, NR[name], result, *[*args, *[0] * 6][:6], len(copies))
    body += b"".join(struct.pack("<BBBI", at, ord(kind), marks, len(data)) + data for at, kind, marks, data in copies)
    return record(1, body)


def decoded(*records: bytes) -> list[Event]:
    return Decoder("x86_64").feed(HELLO + b"".join(records))


def one(*records: bytes) -> CallEvent:
    (event,) = decoded(*records)
    assert isinstance(event, CallEvent)
    return event


# -- what is asked for --------------------------------------------------------------------------------


def test_the_words_name_what_is_copied() -> None:
    words = trace_words(["openat", "execve", "write", "connect", "accept", "uname", "getpid", "read"], "filter", "x86_64", buffer=9)
    assert words[:3] == ("trace", "filter", "bytes=9")
    assert words[3:] == ("257:1s", "59:0s,1v", "1:1b2", "42:1a2", "43:1A2", "63:0F390", "39", "0:1B")
    assert len(trace_words([], "all", "x86_64")) == len(NR) + 3
    assert "56:1s" in trace_words(["openat"], "filter", "aarch64")


# -- records to events ----------------------------------------------------------------------------------


def test_a_call_with_a_path_flags_and_an_error() -> None:
    event = one(call("openat", [(1 << 64) - 100, 0x1000, 0x80000], -2, [(1, "s", 0, b"/n\xff")]))
    assert (event.name, event.result, event.errno, event.error) == ("openat", -2, 2, "ENOENT")
    assert event.args["dirfd"] == -100
    assert event.args["pathname"] == "/n\udcff"
    assert "O_CLOEXEC" in event.args["flags"]  # type: ignore[operator]
    assert (event.at, event.time, event.duration) == (5_000_001_000, 5.000001, 1.5e-6)
    assert text(event) == '[10] openat(AT_FDCWD, "/n\\xff", O_RDONLY|O_CLOEXEC) = -1 ENOENT (No such file or directory) <0.000002>'
    assert json.loads(to_json(event))["args"]["pathname"] == "/n\\xff"


def test_addresses_structures_vectors_and_buffers() -> None:
    inet = struct.pack("<H", 2) + struct.pack(">H", 80) + bytes([127, 0, 0, 1]) + bytes(8)
    event = one(call("connect", [3, 1, 16], -111, [(1, "a", 0, inet)]))
    assert isinstance(event.args["addr"], Address)
    assert "127.0.0.1:80" in text(event)
    event = one(call("execve", [1, 2, 3], 0, [(0, "s", 0, b"/bin/ls"), (1, "v", 1, b"ls\0-l\0")]))
    assert event.args["argv"] == ("ls", "-l")
    assert '["ls", "-l"]...' in text(event)
    assert "NULL" not in text(event)
    event = one(call("write", [1, 2, 100], 100, [(1, "b", 1, b"a\n\x1b[31m" + b"x" * 80)]))
    assert text(event).count("x") <= 80
    assert "\x1b" not in text(event)
    event = one(call("uname", [1], 0, [(0, "F", 0, b"Linux".ljust(390, b"\0"))]))
    assert event.args["buf"]["sysname"] == "Linux"  # type: ignore[index, call-overload]
    event = one(call("openat", [0, 0x1234, 0], 3, [(1, "s", 2, b"")]))
    assert event.args["pathname"] == 0x1234  # unmapped: the pointer that it was


def test_a_call_that_never_returned_and_one_that_is_restarted() -> None:
    assert text(one(call("exit_group", [3], 0, state=1))).startswith("[10] exit_group(3) = ? <")
    assert "ERESTARTSYS" in text(one(call("read", [0, 0, 0], -512)))
    assert "0x7f0000000000" in text(one(call("mmap", result=0x7F0000000000)))


def test_the_other_events() -> None:
    events = decoded(
        record(2, struct.pack("<IiI", 17, 1, 12)),
        record(3, struct.pack("<BI", 1, 9)),
        record(3, struct.pack("<BI", 0, 7), tid=11),
        record(4, struct.pack("<II", 10, 13)),
        record(5, struct.pack("<I", 11) + wire.string("a\nb")),
        record(6, struct.pack("<I", 19)),
        record(7, struct.pack("<Q", 4), 0, 0),
    )
    assert [type(event) for event in events] == [SignalEvent, ExitEvent, ExitEvent, NewEvent, ExecEvent, StopEvent, LostEvent]
    assert [text(event) for event in events] == [
        "[10] --- SIGCHLD from 12 ---",
        "[10] +++ killed by SIGKILL +++",
        "[10/11] +++ exited with 7 +++",
        "[10] +++ new thread 13 +++",
        '[10] +++ runs "a\\nb" +++',
        "[10] --- stopped by SIGSTOP ---",
        "!!! 4 events lost: nobody read them !!!",
    ]
    for event in events:
        assert json.loads(to_json(event))["event"] == event.KIND


def test_records_may_come_in_any_pieces() -> None:
    whole = HELLO + call("getpid", result=10) + record(3, struct.pack("<BI", 0, 0))
    for size in (1, 2, 7):
        decoder = Decoder("x86_64")
        events = [event for at in range(0, len(whole), size) for event in decoder.feed(whole[at : at + size])]
        assert len(events) == 2
        decoder.end()
    decoder.feed(whole[:3])
    with pytest.raises(GuestProtocolError):
        decoder.end()


@pytest.mark.parametrize(
    "bad",
    [
        call("getpid"),
        HELLO + HELLO,
        record(0, struct.pack("<IQ", 2, 0)),
        HELLO + record(8),
        HELLO + record(1),
        HELLO + struct.pack("<I", RECORD_MAX + 1),
        HELLO + struct.pack("<I", 3),
        HELLO + record(3, struct.pack("<BI", 2, 0)),
        HELLO + record(3, struct.pack("<BI", 1, 0)),
        HELLO + record(3, struct.pack("<BI", 0, 0) + b"x"),
        HELLO + record(2, struct.pack("<III", 65, 0, 0)),
        HELLO + record(3, struct.pack("<BI", 0, 0), pid=1 << 23),
        HELLO + record(4, struct.pack("<II", 1 << 23, 1)),
        HELLO + record(5, struct.pack("<I", 1) + wire.string("x" * 65)),
        HELLO + call("getpid", copies=[(6, "s", 0, b"")]),
        HELLO + call("getpid", copies=[(0, "q", 0, b"")]),
        HELLO + call("getpid", state=2),
        HELLO + record(1, struct.pack("<QBIq6QB", 0, 0, 1024, 0, *[0] * 6, 0)),
    ],
)
def test_what_is_no_record_is_refused(bad: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        Decoder("x86_64").feed(bad)


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Records that are nearly right: real heads, any numbers, any bytes copied."""
    parts = [HELLO] if draw(st.booleans()) else []
    u64, u32, u8 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from([1, 1, 1, 1, *range(9)]))
        if kind != 1:
            parts.append(record(kind, draw(st.binary(max_size=40)), draw(st.integers(0, 2**22)), 1, draw(u64)))
            continue
        copies = b""
        count = draw(st.integers(0, 6))
        for _ in range(count):
            data = draw(st.binary(max_size=400))
            copies += (
                struct.pack("<BBBI", draw(st.integers(0, 5)), draw(st.sampled_from(b"svbBaAfF")), draw(st.integers(0, 3)), len(data)) + data
            )
        args = [draw(u64) for _ in range(6)]
        head = (draw(u64), draw(st.integers(0, 1)), draw(st.integers(0, 1023)), draw(st.integers(-(2**63), 2**63 - 1)))
        parts.append(record(1, struct.pack("<QBIq6QB", *head, *args, count) + copies, draw(u32) % 4_194_304, 1, draw(u64)))
    return b"".join(parts) + draw(st.binary(max_size=3)) + bytes([draw(u8)])


@given(hostile())
def test_whatever_comes_is_events_or_a_protocol_error(data: bytes) -> None:
    for machine in ("x86_64", "aarch64"):
        try:
            events = Decoder(machine).feed(data)
        except GuestProtocolError:
            continue
        file, summary = io.StringIO(), Summary()
        with Perfetto(file) as drawn:
            for event in events:
                assert text(event).isprintable()
                json.loads(to_json(event))
                drawn.add(event)
                summary.add(event)
                Filter.make(["openat"], failed=True).keep(event)
        json.loads(file.getvalue())
        summary.table()


@given(st.binary(max_size=200))
def test_any_bytes_are_events_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(GuestProtocolError):
        Decoder("x86_64").feed(HELLO + data)


# -- filters, counts, Perfetto -----------------------------------------------------------------------------


def test_filters() -> None:
    failed, good, end = decoded(call("openat", result=-2), call("read"), record(3, struct.pack("<BI", 0, 0)))
    assert all(Filter().keep(event) for event in (failed, good, end))
    assert [Filter.make(["read"]).keep(event) for event in (failed, good, end)] == [False, True, False]
    assert [Filter.make(errors=["ENOENT"]).keep(event) for event in (failed, good, end)] == [True, False, False]
    assert [Filter.make(errors=["EIO"]).keep(event) for event in (failed, good, end)] == [False, False, False]
    assert [Filter.make(failed=True).keep(event) for event in (failed, good, end)] == [True, False, False]
    assert [Filter.make(pids=[10]).keep(event) for event in (failed, end)] == [True, True]
    assert not Filter.make(pids=[11]).keep(end)
    assert Filter.make(["read"], [3]).keep(decoded(record(7, struct.pack("<Q", 4), 0, 0))[0])
    with pytest.raises(InvalidSpec, match="opnat"):
        Filter.make(["opnat"])
    with pytest.raises(InvalidSpec, match="ENOPE"):
        Filter.make(errors=["ENOPE"])


def test_counts() -> None:
    summary = Summary()
    lost = record(7, struct.pack("<Q", 4), 0, 0)
    for event in decoded(call("read", took=3000), call("read", result=-5, took=1000), call("close", took=2000), lost):
        summary.add(event)
    count = summary.calls["read"]
    assert (count.calls, count.errors, count.longest) == (2, 1, 3e-6)
    assert count.seconds == pytest.approx(4e-6)
    lines = summary.table().splitlines()
    assert lines[2].split() == ["66.67", "0.000004", "2", "2", "1", "read"]
    assert lines[-2].split() == ["100.00", "0.000006", "3", "1", "total"]
    assert lines[-1] == "4 events were lost"
    assert Summary().table().splitlines()[-1].split() == ["0.00", "0.000000", "0", "total"]


def test_perfetto() -> None:
    file = io.StringIO()
    with Perfetto(file) as drawn:
        for event in decoded(call("read"), record(5, struct.pack("<I", 10) + wire.string("sh")), record(2, struct.pack("<IiI", 15, 0, 0))):
            drawn.add(event)
    slices = json.loads(file.getvalue())["traceEvents"]
    assert [(part["ph"], part["name"]) for part in slices] == [("X", "read"), ("M", "process_name"), ("i", "SIGTERM")]
    assert (slices[0]["ts"], slices[0]["dur"], slices[1]["args"]["name"]) == (0, 1.5, "sh")
    with Perfetto(empty := io.StringIO()):
        pass
    assert json.loads(empty.getvalue()) == {"traceEvents": []}
