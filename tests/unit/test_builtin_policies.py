"""What the ready-made policies show, looked at without a machine: texts, addresses, streams."""

from __future__ import annotations

import contextlib
import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.core.errors import InvalidSpec
from trivisor.vos.syscalls.builtin import FakeNet, clock, files, identity, limits, seeded, system
from trivisor.vos.syscalls.builtin.limits import Used, _Size
from trivisor.vos.syscalls.builtin.random import _Stream
from trivisor.vos.syscalls.policy import Policy


def test_all_go_together_in_one_policy() -> None:
    policy = Policy()
    identity(policy, uid=7, gid=8)
    clock(policy, shift=-3600)
    limits(policy, memory=1 << 30)
    seeded(policy, 1)
    system(policy)
    FakeNet(policy)
    opens = [handler for handler in policy.handlers if "openat" in handler.calls]
    assert len(opens) == 1
    assert {"/etc/hostname", "/proc/meminfo", "/dev/urandom", "/etc/hosts"} <= set(opens[0].function.shown)  # type: ignore[attr-defined]
    assert not policy.vdso


def test_files_of_a_policy_are_added_to() -> None:
    policy = Policy()
    files(policy, {"/a": "1", "/b": "2"})
    files(policy, {"/b": "3"})
    assert policy.handlers[0].function.shown == {"/a": "1", "/b": "3"}  # type: ignore[attr-defined]


def test_a_clock_wants_one_time_with_a_zone() -> None:
    with pytest.raises(InvalidSpec):
        clock(Policy(), now=datetime(2001, 1, 1))
    with pytest.raises(InvalidSpec):
        clock(Policy(), now=datetime(2001, 1, 1, tzinfo=UTC), shift=1)


def size(**fields: object) -> _Size:
    given = {"memory": 1 << 30, "swap": 0, "cpus": 2, "booted": 0.0, "model": "m", "used": Used, **fields}
    return _Size(**given)  # type: ignore[arg-type]


def test_memory_is_what_the_limit_is() -> None:
    shown = size(used=lambda: Used(memory=1 << 29)).meminfo()
    assert "MemTotal:        1048576 kB\n" in shown
    assert "MemAvailable:     524288 kB\n" in shown


def test_processors_are_counted_everywhere_alike() -> None:
    of = size(cpus=3)
    assert of.cpuinfo().count("processor\t:") == 3
    assert sum(line.startswith("cpu") for line in of.stat().splitlines()) == 4


def test_more_in_use_than_there_is_leaves_nothing_free() -> None:
    assert size(used=lambda: Used(memory=1 << 40, swap=1 << 40)).sysinfo()["freeram"] == 0


def test_a_stream_is_its_seed() -> None:
    assert _Stream(1).take(64) == _Stream(1).take(64) != _Stream(2).take(64)
    stream = _Stream(b"x")
    assert stream.take(16) != stream.take(16)


def question(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def test_names_of_patterns_have_addresses_and_others_do_not() -> None:
    net = FakeNet(Policy())
    net.host("*.example.com")(print)
    net.host("exact.test", 80)(print)
    answer = net._resolve(question("a.example.com"))
    assert answer[:2] == b"\x12\x34"
    assert answer[-4:-2] == bytes([198, 18])
    assert net._resolve(question("a.example.com"))[-4:] == answer[-4:]
    assert answer[3] & 15 == 0
    assert net._resolve(question("b.example.org"))[3] & 15 == 3, "NXDOMAIN"
    assert net._resolve(question("a.example.com", kind=28))[6:8] == b"\0\0", "no IPv6"
    assert "exact.test" in net._hosts()


@given(st.binary(max_size=300))
def test_any_question_is_answered_or_refused(query: bytes) -> None:
    net = FakeNet(Policy())
    with contextlib.suppress(ConnectionError):
        assert net._resolve(query)[:2] == query[:2]
