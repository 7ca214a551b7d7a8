"""COPY and ADD: which files, where to, as whose; what the layer is then, over a base of unpacked layers."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from trivisor.core.errors import ImageError
from trivisor.images.source import read
from trivisor.images.view import FolderView, StackView, everything, resolve
from trivisor.va.build import ignore
from trivisor.va.build.copy import As, CopyError, Layer, matches

ROOT = As((0, 0))


@pytest.fixture
def base(tmp_path: Path) -> StackView:
    """Two layers: the upper hides a file, a folder's old content, and adds to another."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for place, text in (("usr/bin/a", "a"), ("gone", "x"), ("opaque/old", "x"), ("etc/passwd", "root"), ("deep/er/x", "x")):
        (lower / place).parent.mkdir(parents=True, exist_ok=True)
        (lower / place).write_text(text)
    (lower / "bin").symlink_to("usr/bin")
    (lower / "abs").symlink_to("/usr/bin")
    (lower / "loop").symlink_to("loop")
    for folder in ("usr/bin", "opaque", "deep"):
        (upper / folder).mkdir(parents=True)
    (upper / "usr/bin/b").write_text("b")
    (upper / "opaque/new").write_text("n")
    os.mknod(upper / "gone", 0o020000)
    os.setxattr(upper / "opaque", "user.overlay.opaque", b"y")
    (lower / "usr/bin").chmod(0o700)
    (upper / "usr/bin").chmod(0o711)
    return StackView([upper, lower])


@pytest.fixture
def context(tmp_path: Path) -> Path:
    top = tmp_path / "context"
    for place in ("one.txt", "two.txt", "d/x", "d/e/y", "d/secret.key"):
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        (top / place).write_text(place)
    (top / "d/link").symlink_to("x")
    os.link(top / "one.txt", top / "d/same")
    (top / "out").symlink_to("../../..")
    (top / "one.txt").chmod(0o640)
    return top


@pytest.fixture
def layer(base: StackView) -> Iterator[Layer]:
    with ExitStack() as stack:
        yield Layer(base, "test", stack)


def shown(layer: Layer) -> dict[str, str]:
    return {path: node.kind for path, node in layer.tree.walk()}


def test_layers_as_overlayfs_shows_them(base: StackView) -> None:
    top = base.at("")
    assert top is not None
    assert [node.path for node in everything(base, top)] == [
        *("", "abs", "bin", "deep", "deep/er", "deep/er/x", "etc", "etc/passwd", "loop"),
        *("opaque", "opaque/new", "usr", "usr/bin", "usr/bin/a", "usr/bin/b"),
    ]
    assert (found := resolve(base, "/abs/../bin/b")) is not None
    assert found.open().read() == b"b"
    assert resolve(base, "gone") is None
    assert resolve(base, "opaque/old") is None
    assert resolve(base, "loop") is None
    assert resolve(base, "../../etc/passwd") is not None  # the top is its own parent
    assert (link := resolve(base, "bin", last=False)) is not None
    assert link.target == "usr/bin"


def test_a_folder_goes_where_the_base_leads(layer: Layer, context: Path) -> None:
    view = FolderView(context, ignore.patterns(["**/*.key"]))
    ((_, folder),) = matches(view, "d")
    layer.copy(view, folder, "/bin/new", ROOT)
    assert shown(layer) == {
        "usr": "d",
        "usr/bin": "d",
        "usr/bin/new": "d",
        "usr/bin/new/e": "d",
        "usr/bin/new/e/y": "f",
        "usr/bin/new/link": "l",
        "usr/bin/new/same": "f",
        "usr/bin/new/x": "f",
    }
    folder_there = layer.tree.find("usr/bin")
    assert folder_there is not None
    assert folder_there.mode == 0o711


def test_bytes_owners_and_modes(layer: Layer, context: Path) -> None:
    view = FolderView(context)
    layer.copy(view, matches(view, "./one.txt")[0][1], "/new/deep/it", As((5, 6), 0o755))
    node = layer.tree.find("new/deep/it")
    assert node is not None
    assert node.content is not None
    assert (node.uid, node.gid, node.mode, b"".join(read(layer.sources[0], node.content))) == (5, 6, 0o755, b"one.txt")
    above = layer.tree.find("new")
    assert above is not None
    assert (above.uid, above.mode, above.mtime) == (0, 0o755, node.mtime)


def test_hard_links_stay(layer: Layer, context: Path) -> None:
    view = FolderView(context)
    ((_, top),) = matches(view, ".")
    layer.copy(view, top, "/c", ROOT)
    assert layer.tree.find("c/one.txt") is layer.tree.find("c/d/same")


def test_patterns_and_what_is_not_there(context: Path) -> None:
    view = FolderView(context, ignore.patterns(["two.txt"]))
    assert [node.path for _, node in matches(view, "*.txt")] == ["one.txt"]
    assert [node.path for _, node in matches(view, "d/[xz]")] == ["d/x"]
    assert [node.path for _, node in matches(view, "d/?")] == ["d/e", "d/x"]
    for pattern, says in (
        ("none", "not there"),
        ("two.txt", "not there"),
        ("*.c", "nothing fits"),
        ("../x", "outside"),
        ("d/../../x", "outside"),
    ):
        with pytest.raises(CopyError, match=says):
            matches(view, pattern)
    # A link that leads out of the context leads to its top.
    assert [(name, node.path) for name, node in matches(view, "out")] == [("out", "")]


def test_what_is_left_out_may_be_taken_back(context: Path) -> None:
    view = FolderView(context, ignore.patterns(["d", "!d/e/y"]))
    ((_, top),) = matches(view, "d")
    assert [node.path for node in everything(view, top)] == ["d", "d/e", "d/e/y"]


@pytest.mark.parametrize(("source", "target"), [("one.txt", "/etc/passwd/x"), ("d", "/etc/passwd"), ("one.txt", "/loop/x"), ("d", "/loop")])
def test_where_nothing_can_go(layer: Layer, context: Path, source: str, target: str) -> None:
    view = FolderView(context)
    with pytest.raises(CopyError):
        layer.copy(view, matches(view, source)[0][1], target, ROOT)


def test_the_content_is_told_apart(base: StackView, context: Path) -> None:
    view = FolderView(context)

    def content() -> str:
        with ExitStack() as stack:
            layer = Layer(base, "test", stack)
            layer.copy(view, matches(view, "d")[0][1], "/x", ROOT)
            return layer.content

    first = content()
    os.utime(context / "d/x", (1, 1))
    assert content() == first
    (context / "d/x").write_text("changed")
    assert content() != (first)


def packed(*members: tuple[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_an_archive_is_unpacked(layer: Layer, tmp_path: Path) -> None:
    place = tmp_path / "a.tgz"
    place.write_bytes(packed(("bin/c", b"c"), ("./d", "bin/c")))
    assert layer.extract(place, "/", As())
    node = layer.tree.find("usr/bin/c")
    assert node is not None
    assert node is layer.tree.find("d")
    assert node.content is not None
    assert b"".join(read(layer.sources[node.content.source], node.content)) == b"c"


def test_an_archive_that_leads_out(layer: Layer, tmp_path: Path) -> None:
    place = tmp_path / "a.tgz"
    place.write_bytes(packed(("../../x", b"c")))
    with pytest.raises((ImageError, CopyError)):
        layer.extract(place, "/new", As())


def test_no_archive(layer: Layer, context: Path) -> None:
    assert not layer.extract(context / "one.txt", "/", As())


def test_a_text_of_the_recipe(layer: Layer, tmp_path: Path) -> None:
    layer.write(b"#!/bin/sh\n", tmp_path / "text", "/bin/run", As(mode=0o755))
    node = layer.tree.find("usr/bin/run")
    assert node is not None
    assert (node.mode, node.uid) == (0o755, 0)
