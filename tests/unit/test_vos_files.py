"""Files through a real guest."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from vos_support import RealGuest, real_guest

from trivisor.core.errors import FileError, GuestError, NotFound, StorageError

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest() -> Iterator[RealGuest]:
    with real_guest() as running:
        yield running


def test_read_and_write(guest: RealGuest, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    guest.files.write(path, b"0123456789", mode=0o640)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert guest.files.read(path) == b"0123456789"
    assert guest.files.read(path, 3) == b"3456789"
    assert guest.files.read(path, 3, 4) == b"3456"
    assert guest.files.read(path, 100, 4) == b""
    guest.files.write(path, "é", append=True)
    assert guest.files.read_text(path) == "0123456789é"
    guest.files.write_text(path, "new")
    assert guest.files.read(path) == b"new"
    guest.files.write(path, b"")
    assert guest.files.read(path) == b""
    guest.files.write(path, io.BytesIO(b"x" * 3 * MIB))
    assert guest.files.read(path, max_size=4 * MIB) == b"x" * 3 * MIB
    with pytest.raises(GuestError, match="more than 1M") as caught:
        guest.files.read(path, max_size=MIB)
    assert "download" in caught.value.hint


def test_write_makes_parents_and_refuses_what_exists(guest: RealGuest, tmp_path: Path) -> None:
    path = str(tmp_path / "a" / "b" / "file")
    with pytest.raises(FileError) as missing:
        guest.files.write(path, b"x")
    assert missing.value.errno == errno.ENOENT
    guest.files.write(path, b"x", parents=True)
    with pytest.raises(FileError) as there:
        guest.files.write(path, b"y", exclusive=True)
    assert there.value.errno == errno.EEXIST
    assert guest.files.read(path) == b"x"


def test_errors_are_os_errors_with_the_path(guest: RealGuest, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        guest.files.read(f"{tmp_path}/nothing")
    assert isinstance(caught.value, FileError)
    assert (caught.value.errno, caught.value.filename, caught.value.machine) == (errno.ENOENT, f"{tmp_path}/nothing", "test")
    with pytest.raises(FileError) as folder:
        guest.files.read(str(tmp_path))
    assert folder.value.errno == errno.EISDIR
    with pytest.raises(FileError) as busy:
        (tmp_path / "full" / "x").mkdir(parents=True)
        guest.files.remove(f"{tmp_path}/full")
    assert busy.value.errno == errno.ENOTEMPTY


def test_names(guest: RealGuest, tmp_path: Path) -> None:
    here = str(tmp_path)
    guest.files.mkdir(f"{here}/a/b", parents=True)
    guest.files.mkdir(f"{here}/a/b", parents=True)
    with pytest.raises(FileError):
        guest.files.mkdir(f"{here}/a/b")
    guest.files.mkdir(f"{here}/strict", mode=0o700)
    guest.files.write(f"{here}/file", b"12345")
    guest.files.symlink("file", f"{here}/link")
    guest.files.chmod(f"{here}/file", 0o600)
    entries = {entry.name: entry.info for entry in guest.files.list(here)}
    assert sorted(entries) == ["a", "file", "link", "strict"]
    assert (entries["file"].type, entries["file"].mode, entries["file"].size) == ("file", 0o600, 5)
    assert (entries["link"].type, entries["link"].target) == ("link", "file")
    assert (entries["strict"].type, entries["strict"].mode) == ("folder", 0o700)
    assert abs(entries["file"].mtime - (tmp_path / "file").stat().st_mtime) < 1e-3
    assert guest.files.stat(f"{here}/link").type == "file"
    assert guest.files.stat(f"{here}/link", follow=False).type == "link"
    assert guest.files.stat("/dev/null").type == "other"
    guest.files.rename(f"{here}/file", f"{here}/renamed")
    assert guest.files.exists(f"{here}/renamed")
    assert not guest.files.exists(f"{here}/file")
    assert not guest.files.exists(f"{here}/link")
    assert not guest.files.exists(f"{here}/renamed/below")
    guest.files.remove(f"{here}/a", recursive=True)
    guest.files.remove(f"{here}/link")
    guest.files.remove(f"{here}/strict")
    assert [entry.name for entry in guest.files.list(here)] == ["renamed"]


def test_odd_names(guest: RealGuest, tmp_path: Path) -> None:
    names = [b"caf\xe9", b" space", b"new\nline", "ü".encode(), b"n" * 255, b"-r"]
    for name in names:
        guest.files.write(os.fsdecode(os.fsencode(tmp_path) + b"/" + name), name)
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted(names)
    assert sorted(os.fsencode(entry.name) for entry in guest.files.list(str(tmp_path))) == sorted(names)


def test_a_long_list(guest: RealGuest, tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"{number:05}").touch()
    assert [entry.name for entry in guest.files.list(str(tmp_path))] == [f"{number:05}" for number in range(5000)]


def make_tree(root: Path) -> None:
    (root / "folder" / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "small").write_bytes(b"small")
    (root / "nothing").write_bytes(b"")
    (root / "folder" / "big").write_bytes(os.urandom(3 * MIB + 17))
    (root / "folder" / "deep" / "er" / "program").write_bytes(b"#!/bin/sh\n")
    (root / "folder" / "deep" / "er" / "program").chmod(0o755)
    (root / "link").symlink_to("folder/big")
    (root / "dangling").symlink_to("/no/such")
    for number in range(300):
        (root / "folder" / f"f{number}").write_bytes(b"%d" % number * number)
    os.mkfifo(root / "fifo")
    (root / "folder" / "closed").mkdir()
    (root / "folder" / "closed" / "x").write_bytes(b"x")
    (root / "folder" / "closed").chmod(0o500)
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(1_600_000_000_123_456_789, 1_600_000_000_123_456_789), follow_symlinks=False)


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content: object = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = None if path.is_symlink() else status.st_mode
        found[str(path.relative_to(root))] = (mode, status.st_mtime_ns, content)
    return found


def test_a_tree_there_and_back(guest: RealGuest, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    make_tree(tmp_path / "from")
    expected = describe(tmp_path / "from")
    del expected["fifo"]
    guest.files.upload(tmp_path / "from", f"{tmp_path}/there")
    there = describe(tmp_path / "there")
    assert there.keys() == expected.keys()
    assert {name: (mode, content) for name, (mode, _, content) in there.items()} == {
        name: (mode, content) for name, (mode, _, content) in expected.items()
    }
    assert {n: t for n, (_, t, c) in there.items() if c is not None} == {n: t for n, (_, t, c) in expected.items() if c is not None}
    guest.files.download(f"{tmp_path}/from", tmp_path / "back")
    assert describe(tmp_path / "back") == expected


def test_a_tree_is_merged_into_a_folder_that_exists(guest: RealGuest, tmp_path: Path) -> None:
    for name in ("from", "there", "back"):
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "from" / "sub" / "new").write_text("new")
    (tmp_path / "from" / "both").write_text("from")
    for name in ("there", "back"):
        (tmp_path / name / "sub" / "old").write_text("old")
        (tmp_path / name / "both").write_text("old")
    guest.files.upload(tmp_path / "from", f"{tmp_path}/there/")
    guest.files.download(f"{tmp_path}/from/", tmp_path / "back")
    for name in ("there", "back"):
        assert (tmp_path / name / "sub" / "old").read_text() == "old"
        assert (tmp_path / name / "sub" / "new").read_text() == "new"
        assert (tmp_path / name / "both").read_text() == "from"


def test_single_files_with_progress(guest: RealGuest, tmp_path: Path) -> None:
    content = os.urandom(2 * MIB + 3)
    (tmp_path / "from").write_bytes(content)
    (tmp_path / "from").chmod(0o751)
    seen: list[tuple[int, int | None]] = []
    guest.files.upload(tmp_path / "from", f"{tmp_path}/there", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "there").read_bytes() == content
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o751
    assert seen[-1] == (len(content), len(content))
    seen.clear()
    (tmp_path / "back").write_text("was there")
    guest.files.download(f"{tmp_path}/there", tmp_path / "back", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "back").read_bytes() == content
    assert seen[-1] == (len(content), len(content))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other owners")
def test_owners_are_kept_only_if_asked(guest: RealGuest, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").write_text("x")
    os.chown(tmp_path / "from" / "file", 1234, 77)
    for owners, expected in ((False, (0, 0)), (True, (1234, 77))):
        guest.files.upload(tmp_path / "from", f"{tmp_path}/up{owners}", owners=owners)
        guest.files.download(f"{tmp_path}/from", tmp_path / f"down{owners}", owners=owners)
        for way in ("up", "down"):
            status = (tmp_path / f"{way}{owners}" / "file").stat()
            assert (status.st_uid, status.st_gid) == expected


def test_what_is_missing_or_in_the_way(guest: RealGuest, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        guest.files.upload(tmp_path / "nothing", "/tmp/x")
    with pytest.raises(FileError) as missing:
        guest.files.download(f"{tmp_path}/nothing", tmp_path / "x")
    assert missing.value.errno == errno.ENOENT
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        guest.files.download(f"{tmp_path}/file", tmp_path / "no" / "folder")
    with pytest.raises(FileError) as parent:
        guest.files.upload(tmp_path / "file", f"{tmp_path}/no/folder")
    assert parent.value.errno == errno.ENOENT
    with pytest.raises(StorageError):
        guest.files.upload("/dev/null", f"{tmp_path}/null")


def test_a_progress_that_fails_leaves_what_was_there(guest: RealGuest, tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(8 * MIB))
    (tmp_path / "here").write_text("was there")

    def failing(done: int, total: int | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guest.files.download(f"{tmp_path}/from", tmp_path / "here", progress=failing)
    assert (tmp_path / "here").read_text() == "was there"
    with pytest.raises(ZeroDivisionError):
        guest.files.upload(tmp_path / "from", f"{tmp_path}/there", progress=failing)
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("there")) == ["from", "here"]
    assert guest.files.read(f"{tmp_path}/here") == b"was there"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files as another user")
def test_as_another_user(guest: RealGuest, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    others = type(guest.files)(guest.processes, user="nobody")
    with pytest.raises(FileError) as caught:
        others.read(f"{tmp_path}/secret")
    assert caught.value.errno == errno.EACCES
