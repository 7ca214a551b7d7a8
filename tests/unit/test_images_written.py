"""What a machine wrote, as its guest lists it: the same layer as from the folder itself, and nothing taken on trust."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vos_support import real_guest

from trivisor.core.errors import ImageError
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.stream import Section
from trivisor.images.upper import pack
from trivisor.images.written import Folder, Received


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<I", len(data)) + data


def record(kind: str, path: str | bytes, *, links: int = 1, inode: int = 1, xattrs: bytes = bytes(4), more: bytes = b"") -> bytes:
    return kind.encode() + text(path) + struct.pack("<IIIqQI", 0o100755, 1, 2, 3, inode, links) + xattrs + more


def content(data: bytes, size: int = -1, *pieces: tuple[int, int]) -> bytes:
    size = len(data) if size < 0 else size
    pieces = pieces or ((0, len(data)),)
    return struct.pack("<QI", size, len(pieces)) + b"".join(struct.pack("<QQ", *piece) for piece in pieces) + data


TOP = record("d", "")


@contextmanager
def received(tmp_path: Path, data: bytes, limits: Limits = DEFAULT) -> Iterator[Received]:
    (tmp_path / "stream").write_bytes(data)
    with (tmp_path / "stream").open("rb") as file:
        yield Received(Section(file.fileno(), 0, len(data), "test"), limits)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whiteouts are device nodes")
def test_a_guest_lists_what_lies_there(tmp_path: Path) -> None:
    """Names, kinds, owners, times, attributes, hard links, holes, contents: the layer is the same to a byte."""
    root = tmp_path / "upper"
    (root / "d/e").mkdir(parents=True)
    (root / "d/x").write_text("x" * 300_000)
    os.link(root / "d/x", root / "d/e/same")
    (root / "link").symlink_to("d/./x")
    os.mkfifo(root / "pipe", 0o640)
    os.mknod(root / "gone", 0o020000, 0)
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    (root / "na\udcffme\n").write_bytes(b"")
    with (root / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"in")
        file.truncate(5 << 20)
    (root / "d/x").chmod(0o4711)
    os.chown(root / "d/e", 5, 70000)
    os.utime(root / "d/x", (1, 123456789))
    os.setxattr(root / "d/x", "user.mine", b"\0\xff")
    os.setxattr(root / "d/e", "trusted.overlay.opaque", b"y")
    with real_guest() as guest:
        stream = guest.processes.run_builtin(["upper", str(root)]).stdout
    assert len(stream) < 1 << 20  # holes are not sent
    lower = tmp_path / "lower"
    (lower / "d/e").mkdir(parents=True)
    with received(tmp_path, stream) as listing:
        assert listing.at("d/e").marks == {"opaque": b"y"}
        assert listing.at("d/x").identity == listing.at("d/e/same").identity is not None
        sent = pack(listing, lambda: [lower], tmp_path / "sent")
    seen = pack(Folder(root), [lower], tmp_path / "seen")
    assert (sent.diff_id, sent.digest) == (seen.diff_id, seen.digest)


def test_what_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    deep = tmp_path / "deep"
    deep.mkdir()
    folder = os.open(deep, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=folder)
        folder, old = os.open("d", os.O_RDONLY, dir_fd=folder), folder
        os.close(old)
    os.close(folder)
    with real_guest() as guest:
        for path in ("file", "none", "deep"):
            assert guest.processes.run_builtin(["upper", str(tmp_path / path)]).exit_code != 0


def test_a_disk_that_no_guest_has_had(tmp_path: Path) -> None:
    with received(tmp_path, b"e") as listing:
        assert (listing.names(""), listing.at("").kind) == ([], "d")


def test_files_that_share_and_have_holes(tmp_path: Path) -> None:
    data = TOP + record("f", "a", links=2, more=content(b"xy", 9, (1, 1), (5, 1))) + record("f", "b", links=2, more=content(b"")) + b"e"
    with received(tmp_path, data) as listing:
        assert pack(listing, [], tmp_path / "layer").size
        assert listing.names("") == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        (TOP, "truncated"),
        (TOP + b"ee", "not what a guest would send"),
        (b"d", "truncated"),
        (record("f", "", more=content(b"")) + b"e", "no name in a folder"),
        (record("d", "a") + b"e", "no name in a folder"),
        (TOP + TOP + b"e", "twice"),
        (TOP + record("p", "a") + record("p", "a") + b"e", "twice"),
        (TOP + record("p", "a/b") + b"e", "no name in a folder"),
        (TOP + record("l", "a", more=text("/")) + record("p", "a/b") + b"e", "no name in a folder"),
        *((TOP + record("d", name) + b"e", "no name in a folder") for name in ("..", ".", "/", "a/", "/a", "a/../b", "x" * 256)),
        (TOP + record("p", "a\0b") + b"e", "NUL"),
        (TOP + record("p", "x" * 5000) + b"e", "longer than 4096"),
        (TOP + record("c", "a") + b"e", "no kind 'c'"),
        (TOP + record("p", "a", xattrs=struct.pack("<I", 1 << 31)) + b"e", "too many attributes"),
        (TOP + record("p", "a", xattrs=struct.pack("<I", 1) + text("user.a") + struct.pack("<I", 1 << 30)) + b"e", "longer than 65536"),
        (TOP + record("f", "a", more=struct.pack("<QI", 1, 1 << 31)) + b"e", "too many pieces"),
        (TOP + record("f", "a", more=content(b"x", 1 << 63, (1 << 62, 1 << 62))) + b"e", "truncated"),
        (TOP + record("f", "a", more=content(b"x", 5, ((1 << 64) - 1, 2))) + b"e", "outside"),
        (TOP + record("f", "a", more=content(b"xy", 5, (3, 1), (2, 1))) + b"e", "outside"),
        (TOP + record("f", "a", more=content(b"x", 5, (0, 1))), "truncated"),
    ],
)
def test_hostile_streams(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says), received(tmp_path, data):
        pass


def test_bounds(tmp_path: Path) -> None:
    data = TOP + record("f", "a", more=content(b"x", 1 << 40, (1 << 39, 1))) + b"e"
    with received(tmp_path, data) as listing, pytest.raises(ImageError, match="more than an image may"):
        pack(listing, [], tmp_path / "layer")
    for limits, says in ((Limits(entries=1), "over 1 entries"), (Limits(metadata=10), "over the limit of 10")):
        with pytest.raises(ImageError, match=says), received(tmp_path, TOP + record("f", "a", more=content(b"x")) + b"e", limits):
            pass


def test_cut_anywhere(tmp_path: Path) -> None:
    data = TOP + record("f", "a", xattrs=struct.pack("<I", 1) + text("user.a") + text("v"), more=content(b"xyz", 9, (1, 3))) + b"e"
    for size in range(len(data)):
        with pytest.raises(ImageError), received(tmp_path, data[:size]):
            pass


@pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 10000), marks=pytest.mark.soak)])
def test_anything_else(tmp_path: Path, seeds: range) -> None:
    """Bytes changed here and there: a layer or an ImageError, and nothing else."""
    marks = struct.pack("<I", 1) + text("trusted.overlay.redirect") + text("/x")
    parts = [TOP, record("d", "a", xattrs=marks), record("f", "a/f", links=2, more=content(b"xy", 9, (1, 1), (5, 1)))]
    data = b"".join([*parts, record("l", "a/l", more=text("f")), record("w", "gone"), b"e"])
    lower = tmp_path / "lower"
    (lower / "x/y").mkdir(parents=True)
    layers = 0
    for seed in seeds:
        random_ = random.Random(seed)
        changed = bytearray(data)
        for _ in range(random_.randrange(1, 4)):
            changed[random_.randrange(len(changed))] = random_.choice((0, 1, 0xFF, random_.randrange(256), *b"dflpwe/."))
        try:
            with received(tmp_path, bytes(changed)) as listing:
                pack(listing, [lower], tmp_path / f"layer{seed}", limits=Limits(total=1 << 20))
            layers += 1
        except ImageError:
            continue
    assert layers
