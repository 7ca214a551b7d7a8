"""Frames and payloads: constants, round trips, and that nothing but GuestProtocolError comes out of bad bytes."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.core.errors import GuestProtocolError, InvalidSpec
from trivisor.vos import wire
from trivisor.vos.tree import check_name
from trivisor.vos.wire import Flag, Parser, Reader, Type

FRAME_H = Path(__file__).parents[2] / "guest" / "src" / "frame.h"
frames_of = st.lists(st.tuples(st.integers(1, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=8)


def feed(parser: Parser, data: bytes) -> list[tuple[int, int, bytes]]:
    got = []
    while data:
        space = parser.space()
        part = data[: len(space)]
        space[: len(part)] = part
        got += [(kind, stream, bytes(payload)) for kind, stream, payload in parser.frames(len(part))]
        data = data[len(part) :]
    return got


def test_constants_are_those_of_frame_h() -> None:
    text = FRAME_H.read_text()
    types = {name: int(value, 16) for name, value in re.findall(r"\bF_([A-Z_]+) = (0x[0-9a-f]+)", text)}
    types = {name.removeprefix("FRAME_"): value for name, value in types.items()}
    for kind in Type:
        assert types[kind.name] == kind.value
    numbers = dict(re.findall(r"\b([A-Z_]+) = (0x[0-9a-f]+|\d+)\b,", text))
    assert int(numbers["FRAME_MAGIC"], 16) == wire.MAGIC
    assert int(numbers["FRAME_HEADER"]) == wire.HEADER
    assert int(numbers["FRAME_MAX"]) == wire.FRAME_MAX
    assert int(numbers["PROTOCOL_VERSION"]) == wire.VERSION
    assert int(numbers["NONCE_SIZE"]) == wire.NONCE_SIZE
    assert "WINDOW_SIZE = 256 * 1024" in text
    assert wire.WINDOW == 256 * 1024
    assert re.search(r"CH_STDIN = 0, CH_STDOUT = 1, CH_STDERR = 2", text)


@given(frames_of, st.lists(st.integers(1, 97), min_size=1, max_size=5), st.integers(0, 40))
def test_any_cut_of_a_stream_gives_the_same_frames(frames: list[tuple[int, int, bytes]], cuts: list[int], padding: int) -> None:
    data = b"".join(bytes(padding) + wire.frame(*one) for one in frames)
    parser, got, at = Parser(), [], 0
    while at < len(data):
        cut = cuts[at % len(cuts)]
        got += feed(parser, data[at : at + cut])
        at += cut
    assert got == frames


def test_the_largest_frames_pass_one_after_the_other() -> None:
    parser = Parser(wire.RESYNC)
    data = wire.frame(Type.DATA, 9, bytes(range(256)) * 128)
    got = feed(parser, data[:5] + data[5:] + data * 3 + bytes(100_000) + data)
    assert [payload == data[wire.HEADER :] for _, _, payload in got] == [True] * 5


@pytest.mark.parametrize(
    "bad",
    [
        b"X" + bytes(11),
        wire.frame(Type.DATA, 1)[:2] + b"\1\0" + bytes(8),
        wire.header(Type.DATA, 1, wire.FRAME_MAX + 1),
        wire.header(Type.DATA, 1, 0xFFFFFFFF),
    ],
)
def test_a_malformed_header_is_an_error(bad: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        feed(Parser(), bad)


@given(st.binary(max_size=400))
def test_random_bytes_are_frames_or_an_error(data: bytes) -> None:
    parser = Parser()
    try:
        feed(parser, data)
        feed(parser, b"T" + data)
    except GuestProtocolError:
        pass


decoders = st.sampled_from([wire.parse_exited, wire.parse_error, wire.parse_started, wire.parse_window])


@given(decoders, st.binary(max_size=64))
def test_random_payloads_decode_or_are_an_error(decode, data: bytes) -> None:  # type: ignore[no-untyped-def]
    with contextlib.suppress(GuestProtocolError):
        decode(memoryview(data))


@given(st.binary(max_size=200))
def test_random_records_decode_or_are_an_error(data: bytes) -> None:
    reader = Reader(data)
    try:
        while reader.left:
            name = reader.string()
            check_name(name)
            wire.parse_stat(reader)
    except GuestProtocolError:
        pass


def test_how_a_command_ended() -> None:
    def encoded(how: int, value: int) -> memoryview:
        return memoryview(struct.pack("<BIQQQ", how, value, 2_000_000, 500_000, 3))

    status = wire.parse_exited(encoded(0, 3))
    assert (status.exit_code, status.signal, status.user_seconds, status.system_seconds, status.peak_memory) == (3, None, 2.0, 0.5, 3072)
    killed = wire.parse_exited(encoded(1, 9))
    assert (killed.exit_code, killed.signal) == (137, 9)
    for how, value in ((0, 256), (1, 0), (1, 65), (2, 0)):
        with pytest.raises(GuestProtocolError):
            wire.parse_exited(encoded(how, value))


def test_an_exec_request_is_cut_and_marked() -> None:
    request = wire.exec_request(["x", "y" * 100_000], ["A=b"], flags=Flag.PTY, size=(24, 80), user="u", cwd="/")
    parts = feed(Parser(), b"".join(wire.exec_frames(5, request)))
    assert b"".join(payload[1:] for _, _, payload in parts) == request
    assert [payload[0] for _, _, payload in parts] == [1] * (len(parts) - 1) + [0]
    assert struct.unpack_from("<IHH", request) == (1, 24, 80)


def test_what_a_request_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="NUL"):
        wire.exec_request(["a\0b"], [])
    with pytest.raises(InvalidSpec, match="at most 1048576"):
        wire.exec_request(["x" * wire.EXEC_MAX], [])


def test_names_that_are_not_utf8_survive() -> None:
    assert wire.raw(wire.text(b"caf\xe9")) == b"caf\xe9"


@pytest.mark.parametrize("name", [b"/a", b"a//b", b"a/", b".", b"..", b"a/../b", b"../a", b"a/.", b"n" * 256, b"a/" * 2047 + b"abc"])
def test_names_that_lead_elsewhere_are_refused(name: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        check_name(name)
