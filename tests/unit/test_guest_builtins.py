"""The builtins of the real tvinit: files, trees, figures, connections."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import raw_line as raw
from guest_support import running_guest
from raw_line import BUILTIN, NO_STDIN, RawLine, exec_request


@pytest.fixture
def line() -> Iterator[RawLine]:
    with running_guest() as guest:
        yield guest.line


def header(kind: str, path: str, mode: int, mtime: int = 10**18, uid: int = 0xFFFFFFFF) -> bytes:
    return kind.encode() + raw.string(path) + struct.pack("<IIIQ", mode, uid, uid, mtime)


def file_record(path: str, data: bytes, mode: int = 0o644) -> bytes:
    return header("f", path, mode) + struct.pack("<Q", len(data)) + data


def test_tree_round_trip(line: RawLine, tmp_path: Path) -> None:
    big = os.urandom(3 << 20)
    tree = header("d", "", 0o750) + header("d", "a", 0o500) + header("d", "a/b", 0o711, mtime=5 * 10**17)
    tree += file_record("a/b/f", b"content", 0o640) + file_record("big", big) + file_record("empty", b"")
    tree += header("l", "link", 0o777) + raw.string("a/b/f") + b"e"
    there = tmp_path / "there"
    r = line.run(["put", str(there)], tree, flags=BUILTIN)
    assert (r.how, r.value, bytes(r.stderr)) == ("exit", 0, b"")
    assert (there / "big").read_bytes() == big and (there / "a/b/f").read_bytes() == b"content"
    assert os.readlink(there / "link") == "a/b/f"
    assert stat.S_IMODE((there / "a").stat().st_mode) == 0o500 and (there / "a").stat().st_mtime_ns == 10**18
    assert (there / "a/b").stat().st_mtime_ns == 5 * 10**17 and stat.S_IMODE((there / "a/b/f").stat().st_mode) == 0o640
    got = line.run(["get", str(there)], flags=BUILTIN | NO_STDIN).stdout
    again = tmp_path / "again"
    assert line.run(["put", str(again)], bytes(got), flags=BUILTIN).value == 0
    both = subprocess.run(["diff", "-r", "--no-dereference", there, again], capture_output=True, check=False)
    assert (both.returncode, both.stdout) == (0, b"")
    assert (again / "a/b").stat().st_mtime_ns == 5 * 10**17
    (there / "a").chmod(0o700)
    (again / "a").chmod(0o700)


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../../x", ".", "a/."])
def test_put_refuses_names_that_lead_out(line: RawLine, tmp_path: Path, name: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    r = line.run(["put", str(there)], file_record(name, b"x") + b"e", flags=BUILTIN)
    assert (r.how, r.value) == ("exit", errno.EINVAL)
    assert not list(tmp_path.rglob("x"))


def test_put_does_not_follow_links_in_the_tree(line: RawLine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    tree = header("l", "way", 0o777) + raw.string(str(outside)) + file_record("way/x", b"x") + b"e"
    there = tmp_path / "there"
    there.mkdir()
    assert line.run(["put", str(there)], tree, flags=BUILTIN).value != 0
    assert not list(outside.iterdir())


def test_put_cut_short(line: RawLine, tmp_path: Path) -> None:
    r = line.run(["put", str(tmp_path)], file_record("f", b"12345")[:-2], flags=BUILTIN)
    assert r.how == "exit" and r.value != 0 and r.stderr


def test_file_builtins(line: RawLine, tmp_path: Path) -> None:
    def run(*argv: str, stdin: bytes = b"") -> raw.Result:
        return line.run(argv, stdin, flags=BUILTIN)

    path = str(tmp_path / "p" / "f")
    assert run("write", path, "666", "-").value == errno.ENOENT
    assert run("write", path, "666", "p", stdin=b"hello").value == 0
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    assert run("write", path, "666", "x").value == errno.EEXIST
    assert run("write", path, "666", "a", stdin=b" world").value == 0
    assert run("read", path, "6", "3").stdout == b"wor" and run("read", path, "0", "-1").stdout == b"hello world"
    mode, size, uid, _, mtime, target = struct.unpack("<IQIIQI", run("stat", path).stdout)
    assert (size, target, uid) == (11, 0, os.geteuid()) and stat.S_ISREG(mode) and mtime == os.stat(path).st_mtime_ns
    assert run("symlink", "f", str(tmp_path / "p" / "l")).value == 0
    listed = bytes(run("list", str(tmp_path / "p")).stdout)
    assert raw.string("f") in listed and raw.string("l") in listed and len(listed) == 2 * (5 + 32) + 1
    assert run("chmod", path, "600").value == 0 and run("rename", path, path + "2").value == 0
    assert run("mkdir", str(tmp_path / "x" / "y"), "777", "-").value == errno.ENOENT
    assert run("mkdir", str(tmp_path / "x" / "y"), "777", "p").value == 0
    assert run("remove", str(tmp_path / "x"), "-").value == errno.ENOTEMPTY
    assert run("remove", str(tmp_path / "x"), "r").value == 0 and run("remove", path, "-").value == errno.ENOENT
    assert run("no-such-builtin").value == errno.EINVAL


def test_stats(line: RawLine) -> None:
    pairs = dict(pair.split() for pair in line.run(["stats"], flags=BUILTIN).stdout.decode().splitlines())
    assert int(pairs["memory_total"]) > int(pairs["memory_available"]) > 0 and int(pairs["cpus"]) >= 1


def test_connect(line: RawLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        stream = line.start(exec_request(["connect", "127.0.0.1", str(server.getsockname()[1])], flags=BUILTIN))
        peer, _ = server.accept()
        with peer:
            line.data(stream, b"ask")
            assert peer.recv(10) == b"ask"
            line.data(stream)
            assert peer.recv(10) == b""
            peer.sendall(b"answer")
        r = line.finish(stream, None)
    assert (r.value, bytes(r.stdout)) == (0, b"answer")


def test_connect_refused(line: RawLine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there, nor can anybody else meanwhile
        r = line.run(["connect", "127.0.0.1", str(taken.getsockname()[1])], flags=BUILTIN)
    assert (r.how, r.value) == ("exit", errno.ECONNREFUSED)
