"""A guest that lies about files: what it says is checked, and nothing outside the folder that was named is touched."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
from vos_support import Scripted, scripted, within

from trivisor.core.errors import ExecTimeout, FileError, GuestError, GuestGone, GuestProtocolError, StorageError
from trivisor.vos import command as command_module
from trivisor.vos import wire
from trivisor.vos.tree import NO_OWNER
from trivisor.vos.wire import Type

U32 = struct.Struct("<I")
STAT = struct.pack("<IQIIQ", 0o100644, 5, 0, 0, 0) + wire.string("")


def builtin_that_says(content: bytes, status: int = 0):  # type: ignore[no-untyped-def]
    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        credit = wire.WINDOW
        for at in range(0, len(content), wire.DATA_MAX):
            part = content[at : at + wire.DATA_MAX]
            while credit < len(part):
                credit += wire.parse_window(memoryview(peer.expect(Type.WINDOW)[1]))[1]
            credit -= len(part)
            peer.output(stream, part)
        peer.exited(stream, status)
        peer.frame()

    return script


@pytest.mark.parametrize(
    "content", [b"", b"x", STAT[:-1], STAT + b"x", STAT[:-4] + U32.pack(9) + b"short", STAT[:-4] + wire.string("x")[:-1] + b"\0"]
)
def test_a_stat_that_is_none(content: bytes) -> None:
    with scripted(builtin_that_says(content)) as peer, within(15), pytest.raises(GuestProtocolError):
        peer.files.stat("/x")


@pytest.mark.parametrize("name", [b"", b"..", b"a/b", b"/etc/passwd", b"n" * 256])
def test_a_list_with_a_name_that_is_none(name: bytes) -> None:
    content = wire.string("fine") + STAT + wire.string(name) + STAT
    with scripted(builtin_that_says(content)) as peer, within(15), pytest.raises(GuestProtocolError):
        peer.files.list("/x")


def test_an_endless_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivisor.vos.files._LIST_MAX", 1 << 20)
    with (
        scripted(builtin_that_says((wire.string("name") + STAT) * 100_000)) as peer,
        within(15),
        pytest.raises(GuestError, match="more than 1M"),
    ):
        peer.files.list("/x")


def test_a_read_that_gives_more_than_was_asked() -> None:
    with scripted(builtin_that_says(b"x" * 100)) as peer, within(15), pytest.raises(GuestError, match="more than"):
        peer.files.read("/x", 0, 10)


def test_an_exit_status_that_is_no_errno() -> None:
    with scripted(builtin_that_says(b"", 255)) as peer, within(15), pytest.raises(FileError) as caught:
        peer.files.stat("/x")
    assert caught.value.errno == 255


def record(kind: bytes, path: bytes, rest: bytes = b"", mode: int = 0o755, mtime: int = 10**18) -> bytes:
    return kind + wire.string(path) + struct.pack("<IIIQ", mode, NO_OWNER, NO_OWNER, mtime) + rest


def file(path: bytes, content: bytes = b"content", mode: int = 0o644) -> bytes:
    return record(b"f", path, struct.pack("<Q", len(content)) + content, mode)


def link(path: bytes, target: bytes) -> bytes:
    return record(b"l", path, wire.string(target))


ROOT = record(b"d", b"")


@pytest.mark.parametrize(
    "tree",
    [
        ROOT + file(b"../outside/new"),
        ROOT + file(b"/etc/trivisor-test"),
        ROOT + file(b"a/../../outside/new"),
        ROOT + file(b""),
        ROOT + ROOT,
        ROOT + file(b"x" * 5000),
        ROOT + file(b"x" * 300),
        ROOT + link(b"way", b"../outside") + file(b"way/new"),
        ROOT + link(b"way", b"../outside") + record(b"d", b"way/new"),
        ROOT + link(b"way", b"../outside") + link(b"way/new", b"x"),
        ROOT + file(b"file") + file(b"file/new"),
        ROOT + file(b"no-such-folder/new"),
        ROOT + link(b"empty", b""),
        ROOT + record(b"f", b"huge", struct.pack("<Q", 1 << 63)),
        ROOT + record(b"b", b"device"),
        ROOT + b"\xff" * 64,
        ROOT + b"f" + U32.pack(0xFFFFFFFF),
        ROOT + b"f" + wire.string("nul").replace(b"u", b"\0"),
        file(b"first"),
        ROOT[:9],
        b"",
        ROOT + record(b"f", b"short", struct.pack("<Q", 100) + b"only"),
        ROOT + file(b"fine"),
    ],
)
def test_a_hostile_tree_touches_nothing_outside(tree: bytes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    with scripted(builtin_that_says(tree)) as peer, within(15), pytest.raises(GuestError):
        peer.files.download("/x", tmp_path / "here")
    assert [entry.name for entry in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"outside", "here"}
    if (tmp_path / "here").is_dir():
        assert not [entry for entry in (tmp_path / "here").iterdir() if entry.name.startswith(".trivisor")]


def test_links_that_were_there_are_replaced_not_followed(tmp_path: Path) -> None:
    outside, here = tmp_path / "outside", tmp_path / "here"
    outside.mkdir()
    here.mkdir()
    (outside / "file").write_text("kept")
    (here / "file").symlink_to(outside / "file")
    (here / "folder").symlink_to(outside)
    tree = ROOT + file(b"file") + record(b"d", b"folder") + file(b"folder/file") + link(b"link", b"/etc/passwd") + b"e"
    with scripted(builtin_that_says(tree)) as peer, within(15):
        peer.files.download("/x", here)
    assert (outside / "file").read_text() == "kept"
    assert (here / "file").read_text() == (here / "folder" / "file").read_text() == "content"
    assert not (here / "folder").is_symlink()
    assert (here / "link").readlink() == Path("/etc/passwd")


def test_a_folder_is_never_replaced_by_something_else(tmp_path: Path) -> None:
    (tmp_path / "here" / "mine").mkdir(parents=True)
    with scripted(builtin_that_says(ROOT + file(b"mine") + b"e")) as peer, within(15), pytest.raises(StorageError):
        peer.files.download("/x", tmp_path / "here")
    assert [entry.name for entry in (tmp_path / "here").iterdir()] == ["mine"]


def test_set_id_bits_and_odd_times_from_a_guest(tmp_path: Path) -> None:
    tree = ROOT + file(b"suid", mode=0o6755) + record(b"d", b"d", mode=0o7777, mtime=2**64 - 1) + b"e"
    with scripted(builtin_that_says(tree)) as peer, within(15):
        peer.files.download("/x", tmp_path / "here")
    assert (tmp_path / "here" / "suid").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "here" / "d").stat().st_mode & 0o7777 == 0o777


def test_an_endless_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trivisor.vos.tree.MAX_ENTRIES", 50)
    tree = ROOT + b"".join(record(b"d", b"d%d" % n) for n in range(100))
    with scripted(builtin_that_says(tree)) as peer, within(15), pytest.raises(GuestError, match="more than 50 entries"):
        peer.files.download("/x", tmp_path / "here")
    with (
        scripted(builtin_that_says(ROOT + file(b"big", b"x" * 2000))) as peer,
        within(15),
        pytest.raises(GuestError, match="more than 1000B"),
    ):
        peer.files.download("/x", tmp_path / "here2", max_size=1000)


def test_an_upload_that_the_guest_ends(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(4 << 20))

    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        peer.output(stream, b"/x: No space left on device\n", wire.STDERR)
        peer.exited(stream, 28)
        while True:
            peer.frame()

    with scripted(script) as peer, within(15), pytest.raises(FileError, match="No space") as caught:
        peer.files.upload(tmp_path / "big", "/x")
    assert caught.value.errno == 28


def test_a_line_that_closes_during_a_transfer(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(4 << 20))

    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        peer.output(stream, ROOT + record(b"f", b"cut", struct.pack("<Q", 1000) + b"only"))
        peer.sock.shutdown(socket.SHUT_RDWR)

    with scripted(script) as peer, within(15), pytest.raises(GuestGone):
        peer.files.download("/x", tmp_path / "here")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "big"]
    with scripted(script) as peer, within(15), pytest.raises(GuestGone):
        peer.files.upload(tmp_path / "big", "/x")


def test_transfers_that_stand_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "KILL_WAIT", 0.1)
    (tmp_path / "big").write_bytes(bytes(4 << 20))

    def script(peer: Scripted) -> None:
        peer.run_one()
        while True:
            peer.frame()

    with scripted(script) as peer, within(15):
        with pytest.raises(ExecTimeout):
            peer.files.download("/x", tmp_path / "here", timeout=0.2)
        assert not (tmp_path / "here").exists()
    with scripted(script) as peer, within(15), pytest.raises(ExecTimeout):
        peer.files.upload(tmp_path / "big", "/x", timeout=0.2)
