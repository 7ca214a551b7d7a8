"""Files of a real machine: every verb, trees with all that files have, names of every kind."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivisor import FileError, GuestError, Machine, NotFound, StorageError

MIB = 1 << 20
NAMES = ("two words", "a\nnewline", "tab\there", "ünïcødé 漢字 🙂", "-rf", "~", "$(id)", "'\"", "*", "back\\slash", "...", "x" * 255)


@pytest.fixture
def folder(running: Machine) -> Iterator[str]:
    running.files.mkdir("/srv/test")
    yield "/srv/test"
    running.files.remove("/srv/test", recursive=True)


def test_content(running: Machine, folder: str) -> None:
    files = running.files
    files.write(f"{folder}/a", b"0123456789", mode=0o600)
    assert files.read(f"{folder}/a") == b"0123456789"
    assert files.read(f"{folder}/a", 3, 4) == b"3456"
    assert files.read(f"{folder}/a", 8) == b"89"
    assert files.read(f"{folder}/a", 100) == b""
    files.write(f"{folder}/a", b"!", append=True)
    files.write_text(f"{folder}/t", "grüße")
    assert files.read(f"{folder}/a") == b"0123456789!"
    assert files.read_text(f"{folder}/t") == "grüße"
    files.write(f"{folder}/a", b"short")
    assert files.read(f"{folder}/a") == b"short"
    assert files.stat(f"{folder}/a").mode == 0o600
    files.write(f"{folder}/deep/er/b", b"", parents=True)
    assert files.read(f"{folder}/deep/er/b") == b""


def test_what_fails_is_an_oserror_with_its_number(running: Machine, folder: str) -> None:
    files = running.files
    files.write(f"{folder}/a", b"")
    files.symlink("loop", f"{folder}/loop")
    for call, number in (
        (lambda: files.read(f"{folder}/none"), errno.ENOENT),
        (lambda: files.read(folder), errno.EISDIR),
        (lambda: files.read(f"{folder}/loop"), errno.ELOOP),
        (lambda: files.write(f"{folder}/a", b"", exclusive=True), errno.EEXIST),
        (lambda: files.write(f"{folder}/none/a", b""), errno.ENOENT),
        (lambda: files.write("/dev/full", b"x"), errno.ENOSPC),
        (lambda: files.list(f"{folder}/a"), errno.ENOTDIR),
        (lambda: files.list(f"{folder}/none"), errno.ENOENT),
        (lambda: files.stat(f"{folder}/none"), errno.ENOENT),
        (lambda: files.remove(f"{folder}/none"), errno.ENOENT),
        (lambda: files.remove("/srv"), errno.ENOTEMPTY),
        (lambda: files.mkdir(folder), errno.EEXIST),
        (lambda: files.mkdir(f"{folder}/a/b", parents=True), errno.ENOTDIR),
        (lambda: files.rename(f"{folder}/none", f"{folder}/b"), errno.ENOENT),
        (lambda: files.chmod(f"{folder}/none", 0o600), errno.ENOENT),
        (lambda: files.symlink("x", f"{folder}/a"), errno.EEXIST),
        (lambda: files.read("x" * 5000), errno.ENAMETOOLONG),
    ):
        with pytest.raises(FileError) as caught:
            call()
        assert (errno.errorcode[caught.value.errno], isinstance(caught.value, OSError)) == (errno.errorcode[number], True)
    assert not files.exists(f"{folder}/none")
    assert not files.exists(f"{folder}/a/none")


def test_names_and_marks(running: Machine, folder: str) -> None:
    files = running.files
    files.mkdir(f"{folder}/d", mode=0o750)
    files.mkdir(f"{folder}/d/e/f", parents=True)
    files.mkdir(f"{folder}/d/e/f", parents=True)
    files.write(f"{folder}/a", b"abc", mode=0o640)
    files.symlink("a", f"{folder}/link")
    files.chmod(f"{folder}/a", 0o4711)
    running.exec(["mkfifo", f"{folder}/fifo"], check=True)
    running.exec(["chown", "12:34", f"{folder}/a"], check=True)
    running.exec(["touch", "-d", "@1000000000.5", f"{folder}/a"], check=True)
    listed = {entry.name: entry.info for entry in files.list(folder)}
    assert [*listed] == ["a", "d", "fifo", "link"]
    assert {name: info.type for name, info in listed.items()} == {"a": "file", "d": "folder", "fifo": "other", "link": "link"}
    info = files.stat(f"{folder}/link")
    assert (info.type, info.size, info.uid, info.gid, info.mtime) == ("file", 3, 12, 34, 1000000000.5)
    assert files.stat(f"{folder}/link", follow=False).target == "a"
    assert listed["d"].mode == 0o750
    files.rename(f"{folder}/a", f"{folder}/b")
    assert not files.exists(f"{folder}/link")
    files.remove(f"{folder}/link")
    files.remove(f"{folder}/d", recursive=True)
    assert [entry.name for entry in files.list(folder)] == ["b", "fifo"]


def test_a_recursive_remove_does_not_follow_links(running: Machine, folder: str) -> None:
    running.files.write(f"{folder}/kept/file", b"", parents=True)
    running.files.mkdir(f"{folder}/tree")
    running.files.symlink(f"{folder}/kept", f"{folder}/tree/link")
    running.files.remove(f"{folder}/tree", recursive=True)
    assert running.files.exists(f"{folder}/kept/file")


def test_names_of_every_kind(running: Machine, folder: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for name in NAMES:
        (local / name).write_text(name)
        running.files.write_text(f"{folder}/{name}", name)
        assert running.files.read_text(f"{folder}/{name}") == name
    (local / os.fsdecode(b"not utf-8 \xff")).write_text("")
    assert [entry.name for entry in running.files.list(folder)] == sorted(NAMES)
    running.files.upload(local, f"{folder}/up")
    running.files.download(f"{folder}/up", tmp_path / "down")
    assert contents(tmp_path / "down") == contents(local)


def test_trees_there_and_back(running: Machine, folder: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(os.urandom(100_000))
    (tree / "nothing").write_bytes(b"")
    (tree / "script").write_text("#!/bin/sh\necho ran\n")
    (tree / "script").chmod(0o755)
    (tree / "secret").write_text("s")
    (tree / "secret").chmod(0o400)
    (tree / "link").symlink_to("sub/file")
    (tree / "out").symlink_to("/etc/passwd")
    (tree / "dangling").symlink_to("no/where")
    os.utime(tree / "script", ns=(1, 1_234_567_890_123_456_789))
    (tree / "sub").chmod(0o700)
    os.utime(tree / "sub", ns=(1, 987_654_321_000_000_000))
    running.files.upload(tree, f"{folder}/tree")
    assert running.exec([f"{folder}/tree/script"], check=True).text == "ran\n"
    info = running.files.stat(f"{folder}/tree/out", follow=False)
    assert (info.type, info.target, info.uid) == ("link", "/etc/passwd", 0)
    running.files.download(f"{folder}/tree", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tree)


def test_owners(running: Machine, folder: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, uid in (("a", 1000), ("b", 2)):
        (tree / name).write_text("")
        os.chown(tree / name, uid, uid + 1)
    running.files.upload(tree, f"{folder}/default")
    assert {(entry.info.uid, entry.info.gid) for entry in running.files.list(f"{folder}/default")} == {(0, 0)}
    running.files.upload(tree, f"{folder}/kept", owners=True)
    assert [(entry.info.uid, entry.info.gid) for entry in running.files.list(f"{folder}/kept")] == [(1000, 1001), (2, 3)]
    running.files.download(f"{folder}/kept", tmp_path / "mine")
    assert {path.stat().st_uid for path in (tmp_path / "mine").iterdir()} == {0}
    running.files.download(f"{folder}/kept", tmp_path / "theirs", owners=True)
    assert {path.name: path.stat().st_gid for path in (tmp_path / "theirs").iterdir()} == {"a": 1001, "b": 3}


def test_set_id_bits_do_not_reach_the_host(running: Machine, folder: str, tmp_path: Path) -> None:
    running.files.write(f"{folder}/evil", b"", mode=0o755)
    running.files.chmod(f"{folder}/evil", 0o6755)
    running.files.download(folder, tmp_path / "down")
    assert stat.S_IMODE((tmp_path / "down/evil").stat().st_mode) == 0o755


@pytest.mark.timeout(300)
def test_a_large_file_there_and_back(running: Machine, folder: str, tmp_path: Path) -> None:
    """100 MB: content, progress, and the place on the machine's disk that it needs."""
    piece = os.urandom(MIB)
    source = tmp_path / "source"
    with source.open("wb") as stream:
        for _ in range(100):
            stream.write(piece)
    seen: list[int] = []
    running.files.upload(source, f"{folder}/large", progress=lambda done, *_: seen.append(done))
    assert seen == sorted(seen)
    assert running.files.stat(f"{folder}/large").size == 100 * MIB
    running.files.download(f"{folder}/large", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(source)
    assert running.files.read(f"{folder}/large", 99 * MIB, MIB) == piece


def test_a_hostile_folder_cannot_leave_the_local_one(running: Machine, folder: str, tmp_path: Path) -> None:
    """What a guest can do without lying in the protocol: links, and names that a host might take for something else."""
    (tmp_path / "outside").mkdir()
    running.files.mkdir(f"{folder}/t")
    running.files.symlink(str(tmp_path / "outside"), f"{folder}/t/a")
    running.files.symlink("../../outside", f"{folder}/t/b")
    running.files.symlink("/", f"{folder}/t/c")
    (tmp_path / "local").mkdir()
    # A link that is there already, where the machine now sends a folder with a file in it.
    (tmp_path / "local/d").symlink_to(tmp_path / "outside")
    running.files.write(f"{folder}/t/d/planted", b"", parents=True)
    for _ in range(2):
        running.files.download(f"{folder}/t", tmp_path / "local")
        assert (tmp_path / "local/d").is_dir()
        assert not (tmp_path / "local/d").is_symlink()
        assert sorted(path.name for path in (tmp_path / "local").iterdir()) == ["a", "b", "c", "d"]
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_file_that_never_ends_is_bounded(running: Machine, tmp_path: Path) -> None:
    with pytest.raises(GuestError):
        running.files.read("/dev/zero", max_size=MIB)
    running.exec("truncate -s 1T /tmp/sparse", check=True)
    with pytest.raises(GuestError):
        running.files.download("/tmp/sparse", tmp_path / "sparse", max_size=MIB)
    running.files.remove("/tmp/sparse")


def test_local_faults(running: Machine, folder: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        running.files.upload(tmp_path / "none", f"{folder}/x")
    with pytest.raises(FileError):
        running.files.download(f"{folder}/none", tmp_path / "x")
    running.files.write(f"{folder}/a", b"a")
    with pytest.raises(StorageError):
        running.files.download(f"{folder}/a", tmp_path / "no/such/place")
    (tmp_path / "local").write_text("local")
    with pytest.raises(FileError):
        running.files.upload(tmp_path / "local", "/proc/no/such")
    assert running.files.read(f"{folder}/a") == b"a"


@pytest.mark.walls("vm", "gvisor")  # a container may not mount
def test_a_full_disk_in_the_machine(running: Machine, tmp_path: Path) -> None:
    """ENOSPC of a file system of the guest comes back as that, from write and from upload."""
    running.exec("mkdir -p /mnt/small && mount -t tmpfs -o size=1m none /mnt/small", check=True)
    (tmp_path / "big").write_bytes(bytes(3 * MIB))
    for call in (
        lambda: running.files.write("/mnt/small/a", bytes(3 * MIB)),
        lambda: running.files.upload(tmp_path / "big", "/mnt/small/b"),
    ):
        with pytest.raises(FileError) as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
        running.exec("rm -f /mnt/small/*", check=True)
    running.exec("umount /mnt/small", check=True)


def contents(root: Path) -> dict[str, tuple[object, ...]]:
    """Return all that a tree is, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        if path.is_symlink():
            found[str(path.relative_to(root))] = ("link", os.readlink(path))
        else:
            content = b"" if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(root))] = (stat.S_IMODE(info.st_mode), info.st_mtime_ns, content)
    return found


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
