"""Decoders against what hostile programs may point to: nothing but ValueError, and no more than was given."""

from __future__ import annotations

import array
import contextlib
import functools
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import BadArgument, CallGone
from trivisor.launch.syscalls import SYSCALLS
from trivisor.vos.syscalls import decode, flags, table
from trivisor.vos.syscalls.asked import Asked, Handled
from trivisor.vos.syscalls.listener import Listener

REGISTER = st.one_of(st.integers(0, 64), st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 31, 1 << 32, 1 << 63]))
RAW = st.binary(max_size=400)
EXAMPLES = settings(max_examples=300, deadline=None)


@pytest.mark.fuzz
@EXAMPLES
@given(raw=RAW)
def test_decoders_raise_nothing_but_value_error(raw: bytes) -> None:
    structs = [functools.partial(decode.fields, kind) for kind in decode.STRUCTS]
    for decoder in (decode.address, decode.iovec, decode.message, decode.controls, *structs):
        with contextlib.suppress(ValueError):
            str(decoder(raw))


@pytest.mark.fuzz
@EXAMPLES
@given(family=st.sampled_from([0, 1, 2, 10, 16, 17, 40, 99]), rest=st.binary(max_size=126))
def test_every_family_of_every_length(family: int, rest: bytes) -> None:
    found = decode.address(struct.pack("<H", family) + rest)
    assert found.raw[2:] == rest
    assert isinstance(str(found), str)


@pytest.mark.fuzz
@EXAMPLES
@given(kind=st.sampled_from(sorted(decode.FLAGS)), number=st.integers(0, (1 << 64) - 1), machine=st.sampled_from(["x86_64", "aarch64"]))
def test_flags_say_all_of_a_number(kind: str, number: int, machine: str) -> None:
    found = flags.flags(kind, number, machine)
    assert found == number
    assert all(name in found for name in found if not name.startswith("0x"))
    group = found.group
    values = {name: value for value, name in group.values.items()} if group.values else {}
    total = 0
    for name in found:
        total |= int(name, 16) if name.startswith("0x") else group.bits.get(name, values.get(name, 0))
    assert total == number


class Memory:
    """A program whose memory holds `raw` at every address below 1 << 47."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.read_bytes = 0

    def read(self, notification: object, address: int, size: int) -> bytes:
        if address >= 1 << 47:
            raise BadArgument(14, "none")
        data = self.raw[address % (len(self.raw) or 1) :][:size]
        self.read_bytes += len(data)
        if size and not data:
            raise BadArgument(14, "none")
        return data

    def string(self, notification: object, address: int, most: int) -> bytes | None:
        return self.read(notification, address, most).split(b"\0")[0]

    def link(self, notification: object, name: str) -> str:
        raise FileNotFoundError(2, name)


@pytest.mark.fuzz
@EXAMPLES
@given(
    name=st.sampled_from(sorted(table.signatures())),
    args=st.lists(REGISTER, min_size=6, max_size=6),
    raw=st.binary(max_size=6000),
)
def test_no_argument_of_any_call_harms_us(name: str, args: list[int], raw: bytes) -> None:
    """Every way of looking at every call, whatever its registers and memory hold: a value, or an error of those that are named."""
    memory = Memory(raw)
    handled = Handled(lambda call: None, table.signature(name))
    asked = Asked(cast(Listener, memory), (1, 2, 0, 3, 0xC000003E, 4, *args), handled)
    repr(asked)
    looks: list[Callable[[], object]] = [asked.path, asked.full_path, asked.sockaddr, asked.buffer, asked.iovec, asked.msghdr]
    looks += [asked.controls, asked.struct, lambda: asked.flags, asked.fd_path]
    looks += [functools.partial(asked.arg, argument.name) for argument in handled.signature.arguments]
    for look in looks:
        with contextlib.suppress(BadArgument, LookupError, CallGone):
            str(look())
    assert memory.read_bytes < 64 << 20


def test_addresses_by_family() -> None:
    assert str(decode.address(decode.encode_address("1.2.3.4", 80))) == "1.2.3.4:80"
    assert str(decode.address(decode.encode_address("::1", 80, 3))) == "[::1]:80"
    assert decode.address(decode.encode_address("fe80::1", 1, 3)).scope == 3
    assert decode.address(decode.encode_address("/run/x")).path == "/run/x"
    assert decode.address(decode.encode_address("@abstract")).path == "@abstract"
    assert decode.address(struct.pack("<HHII", socket.AF_VSOCK, 0, 1024, 2) + bytes(4)) == decode.Address(
        "AF_VSOCK", "2", 1024, raw=struct.pack("<HHII", socket.AF_VSOCK, 0, 1024, 2) + bytes(4)
    )
    assert decode.address(struct.pack("<HHII", socket.AF_NETLINK, 0, 7, 1)).port == 7
    assert decode.address(b"").family == "AF_UNSPEC"
    with pytest.raises(ValueError, match="bytes"):
        decode.address(bytes(129))
    with pytest.raises(ValueError, match="port"):
        decode.encode_address("1.2.3.4", 70000)


def test_layouts_are_the_kernels() -> None:
    sizes = {kind: layout.size for kind, layout in decode.STRUCTS.items()}
    assert sizes == {
        "timespec": 16, "timespec2": 32, "timeval": 16, "timeval2": 32, "itimerspec": 32, "rlimit": 16, "utsname": 390, "sysinfo": 112,
        "open_how": 24, "clone_args": 64, "epoll_event": 12,
    }  # fmt: skip
    assert decode.fields("utsname", decode.encode_fields("utsname", {"sysname": "x" * 100}))["sysname"] == "x" * 64
    with pytest.raises(ValueError, match="no tv_msec"):
        decode.encode_fields("timespec", {"tv_msec": 1})
    with pytest.raises(ValueError, match="hold"):
        decode.encode_fields("rlimit", {"rlim_cur": -1})


def test_control_messages_are_those_of_this_python() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [0, 1])
        _, parts, _, _ = theirs.recvmsg(1, 100)
        for _, _, data in parts:
            for fd in array.array("i", data):
                os.close(fd)
    raw = struct.pack("<Qii", 16 + 8, socket.SOL_SOCKET, socket.SCM_RIGHTS) + struct.pack("<ii", 5, 6)
    assert [control.fds for control in decode.controls(raw + raw)] == [(5, 6), (5, 6)]
    assert decode.controls(raw[:-1]) == ()


def test_open_flags_are_this_hosts() -> None:
    if os.uname().machine == "x86_64":
        for name in (
            "O_CREAT",
            "O_DIRECTORY",
            "O_NOFOLLOW",
            "O_PATH",
            "O_TMPFILE",
            "O_DIRECT",
            "O_CLOEXEC",
            "O_NOATIME",
            "O_SYNC",
            "O_DSYNC",
        ):
            assert decode.FLAGS["OPEN"].bits[name] == getattr(os, name)
    assert str(flags.flags("OPEN", 0x4000, "aarch64")) == "O_RDONLY|O_DIRECTORY"
    assert list(flags.flags("SOCK", socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) == ["SOCK_STREAM", "SOCK_CLOEXEC"]


def test_calls_of_the_table_exist() -> None:
    known = set(SYSCALLS["x86_64"]) | set(SYSCALLS["aarch64"])
    assert set(table.signatures()) <= known
    kinds = {
        "int",
        "int64",
        "uint",
        "size",
        "pid",
        "uid",
        "sig",
        "fd",
        "dirfd",
        "mode",
        "dev",
        "path",
        "str",
        "in",
        "out",
        "iovec",
        "iovec_out",
    }
    kinds |= {"sockaddr", "sockaddr_out", "msghdr", "msghdr_out", "strings", "ptr", *decode.FLAGS}
    kinds |= {kind + suffix for kind in decode.STRUCTS for suffix in ("", "_out")}
    for known_call in table.signatures().values():
        for argument in known_call.arguments:
            assert argument.kind in kinds, (known_call.name, argument)
            assert (argument.length is None) == (argument.kind not in {"in", "out", "iovec", "iovec_out", "sockaddr", "sockaddr_out"})


def test_errors_say_what_arguments_there_are() -> None:
    with pytest.raises(LookupError, match=r"getpid has no path or str argument; it has none"):
        table.signature("getpid").find(None, frozenset({"path", "str"}))
    with pytest.raises(LookupError, match=r"pathname \(path\)"):
        table.signature("rmdir").find("path", frozenset())
    assert len(table.signature("no_such_call").arguments) == 6
