"""Unpacked layers, one folder each: what overlayfs shows of them is what the image's layers say, put over one another in memory."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from squash_support import make_home, squashfs, unpacked
from tar_maker import END, block, file, folder, hardlink, pax, symlink
from test_images_layers import BASE, SECOND, THIRD, saved

from trivisor.core.errors import ImageError
from trivisor.core.paths import Home
from trivisor.images import roots
from trivisor.images.catalog import Image, Images
from trivisor.images.view import StackView, everything

ROOT = os.geteuid() == 0
Facts = dict[str, tuple[Any, ...]]


def made(home: Home, layers: list[bytes], name: str = "x") -> Image:
    archive = home.root / "archive"
    archive.write_bytes(saved(layers))
    return Images(home).import_(archive, name)


def shown(lowers: tuple[Path, ...]) -> Facts:
    """What overlayfs shows of the layers, and for each file which other names it has."""
    view = StackView(lowers)
    top = view.at("")
    assert top is not None
    names: dict[tuple[int, int], list[str]] = {}
    nodes = list(everything(view, top))
    for node in nodes:
        if node.kind == "f":
            names.setdefault(node.identity, []).append(node.path)
    found: Facts = {}
    for node in nodes:
        data = node.open().read() if node.kind == "f" else b""
        others = sorted(names.get(node.identity, ())) if node.kind == "f" else []
        found[node.path] = (node.kind, node.mode, node.uid, node.gid, node.mtime // 10**9, node.target, node.xattrs, data, others)
    return found


def same(home: Home, image: Image, tmp_path: Path) -> Facts:
    """See to it that layers and merged root are the same; return what they are."""
    lowers = Images(home).lowers(image.digest)
    assert len(lowers) == len(image.layers)
    found = shown(lowers)
    target = tmp_path / f"merged-{len(list(tmp_path.iterdir()))}"
    merged = shown(unpacked(squashfs(image), target))
    shutil.rmtree(target)
    for name in found.keys() & {"proc", "sys", "dev", "run", "tmp"}:
        found[name] = merged[name] = found[name][:4]
    assert found == merged
    return found


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def test_three_layers(home: Home, tmp_path: Path) -> None:
    two = same(home, made(home, [BASE, SECOND]), tmp_path)
    assert two["usr/lib/through"][7] == b"through" and two["usr/lib/old"][7] == b"replaced" and two["usr/lib/hard"][7] == b"old"
    assert [name for name in two if name.startswith("var/cache/")] == ["var/cache/new"]
    three = same(home, made(home, [BASE, SECOND, THIRD], "y"), tmp_path)
    assert [name for name in three if name.startswith("etc/")] == ["etc/c"] and "var/cache" not in three


CASES = {
    "folder-over-file": [file("a", b"x") + END, folder("a") + file("a/b", b"y") + END],
    "file-over-folder": [folder("a") + file("a/b") + END, file("a", b"x") + END],
    "link-over-folder": [folder("a") + file("a/b") + folder("c") + END, symlink("a", "c") + END, file("a/d", b"d") + END],
    "folder-over-link": [symlink("a", "c") + folder("c") + END, folder("a") + file("a/b") + END],
    "whiteout-then-again": [folder("a") + file("a/b") + file("a/c") + END, file(".wh.a") + folder("a") + file("a/d") + END],
    "again-then-whiteout": [folder("a") + file("a/b") + END, folder("a") + file("a/d") + file(".wh.a") + END],
    "borrowed-then-whiteout": [folder("a/b/c") + file("a/b/x") + file("a/y") + END, file("a/b/c/new") + file("a/.wh.b") + END],
    "borrowed-and-nothing": [folder("a/b/c") + file("a/b/x") + END, file("a/b/c/.wh.nothing") + file("z") + END, file(".wh.a") + END],
    "opaque-root": [file("a") + folder("b") + file("b/c") + END, folder("b") + file("b/d") + file(".wh..wh..opq") + END],
    "opaque-deep": [folder("a/b/c") + file("a/b/c/x") + file("a/z") + END, file("a/b/.wh..wh..opq") + file("a/b/c/y") + END],
    "opaque-twice": [folder("a") + file("a/x") + END, file("a/.wh..wh..opq") + file("a/y") + END, file("a/z") + END],
    "file-then-folder": [folder("a") + file("a/x") + END, file("a") + folder("a") + file("a/y") + END],
    "link-to-below": [file("a", b"below") + END, hardlink("b", "a") + END, file("a", b"new") + END],
    "link-to-below-through": [folder("d") + file("d/a", b"below") + symlink("s", "d") + END, hardlink("s/b", "s/a") + END],
    "mode-of-a-folder": [folder("a") + file("a/x") + END, block("a", "5", mode=0o2710, uid=5, gid=6, mtime=7) + END],
    "root": [block("./", "5", mode=0o711, uid=3, gid=4, mtime=9) + block("a", uid=3, gid=4) + END, file("b") + END],
    "root-again": [file("a") + END, block("./", "5", mode=0o700, uid=3, gid=4, mtime=9) + block("b", uid=3, gid=4) + END],
    "attributes": [pax([(b"SCHILY.xattr.user.a", b"1")]) + folder("a") + END, pax([(b"SCHILY.xattr.user.b", b"2")]) + file("a/b") + END],
    "steering": [pax([(b"SCHILY.xattr.user.overlay.opaque", b"y")]) + folder("a") + file("a/b") + END, folder("a") + END],
    "fifo": [block("p", "6", mode=0o4620, uid=7) + END, hardlink("q", "p") + END, file(".wh.p") + END],
    "char-0-0": [file("a") + folder("b") + file("b/c") + END, block("a", "3") + block("b", "3") + file("z") + END],
    "needed": [file("a") + END, file("b") + END, file(".wh.tmp") + END],
    "setuid": [block("s", mode=0o6755, uid=0, gid=8) + END, hardlink("t", "s") + END],
}


@pytest.mark.skipif(not ROOT, reason="needs root to give files away, which both ways of unpacking then do")
@pytest.mark.parametrize("case", CASES)
def test_cases(home: Home, tmp_path: Path, case: str) -> None:
    same(home, made(home, CASES[case]), tmp_path)


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.soak)])
def test_random_layers(home: Home, tmp_path: Path, seeds: range) -> None:
    names = ["a", "b", "a/x", "a/y", "a/z/q", "b/x", "a/z", "c", "a/z/q/r", "l/x", "l", "l/z/n"]
    tried = whole = 0
    for seed in seeds:
        random_ = random.Random(seed)
        layers = []
        for number in range(4):
            data = b""
            kinds: dict[str, str] = {}
            for name in random_.sample(names, 5):
                base, _, leaf = name.rpartition("/")
                if any(kinds.get(name.rsplit("/", depth)[0], "d") not in "d" for depth in range(1, name.count("/") + 1)):
                    continue
                kind = kinds[name] = random_.choice("dddddwwwooscf" if name in ("a", "b", "a/z", "a/z/q", "l") else "fffffwwwhdc")
                if kind == "w":
                    data += file(f"{base}/.wh.{leaf}" if base else f".wh.{leaf}")
                elif kind in "sh":
                    other = random_.choice(names if kind == "s" else ["keep", "keep", *kinds])
                    data += symlink(name, f"/{other}") if kind == "s" else hardlink(name, other)
                    kinds[name] = "d" if kind == "s" else "f"
                elif kind == "c":
                    data += block(name, "3")
                elif kind == "o":
                    data += folder(name) + file(f"{name}/.wh..wh..opq")
                    kinds[name] = "d"
                else:
                    data += folder(name) if kind == "d" else file(name, f"{number} {name}".encode())
            layers.append(data + END)
        tried += 1
        try:
            image = made(home, [file("keep") + END, *layers])
        except ImageError:
            continue  # a file of a layer below stands where a folder would have to be
        same(home, image, tmp_path)
        whole += 1
        Images(home).remove("x")
    assert whole > tried // 8
    assert list((home.cache / "trees").glob("sha256-*[!k]")) == []


@pytest.mark.skipif(not ROOT, reason="needs root to mount")
def test_overlayfs_agrees(home: Home, tmp_path: Path) -> None:
    """The kernel's own word on the marks that hide things."""
    layers = [BASE, SECOND, THIRD, *CASES["opaque-deep"], *CASES["whiteout-then-again"]]
    lowers = Images(home).lowers(made(home, layers).digest)
    target = tmp_path / "mounted"
    target.mkdir()
    options = "userxattr,lowerdir=" + ":".join(str(lower) for lower in lowers)
    if subprocess.run(["mount", "-t", "overlay", "none", "-o", options, target], capture_output=True, check=False).returncode:
        pytest.skip("needs overlayfs, which the kernel does not give here")
    try:
        seen = {str(path.relative_to(target)): stat.S_IFMT(path.lstat().st_mode) for path in target.rglob("*")}
    finally:
        subprocess.run(["umount", target], check=True)
    kinds = {"f": stat.S_IFREG, "d": stat.S_IFDIR, "l": stat.S_IFLNK, "p": stat.S_IFIFO}
    assert seen == {name: kinds[facts[0]] for name, facts in shown(lowers).items() if name}


def test_a_second_image_unpacks_only_what_is_new(home: Home) -> None:
    images = Images(home)
    first = images.lowers(made(home, [BASE, SECOND]).digest)
    said: list[str] = []
    other = made(home, [BASE, SECOND, file("new", b"x") + END], "y")
    lowers = images.lowers(other.digest, said.append)
    assert lowers[1:] == first and said == ["unpacking layer 3 of 3"]
    assert len(list((images.store.root / "blobs/sha256").iterdir())) == 3 + 4  # layers once; two configs, two manifests
    names = {path.name for path in lowers[0].rglob("*")}
    assert names == {"new"}
    images.remove("x:latest")
    assert all(path.exists() for path in lowers)
    images.remove("y")
    assert not any(path.exists() for path in lowers) and images.sweep(set) == []


def test_a_layer_that_is_not_what_the_config_says(home: Home) -> None:
    images = Images(home)
    image = made(home, [BASE, SECOND])
    blob = images.store.path(image.layers[1].digest)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes().replace(b"replaced", b"REPLACED"))
    assert [image.layers[1].digest in line for line in images.check()] == [True]
    for root in (images.lowers, images.rootfs):
        with pytest.raises(ImageError, match="not what the image's config says"):
            root(image.digest)
    assert not [path for path in (home.cache / "trees").iterdir() if path.suffix != ".lock"]
    assert list(home.tmp.iterdir()) == []


def test_sparse_files_stay_sparse(home: Home) -> None:
    hole = pax([(b"GNU.sparse.map", b"1048576,4"), (b"GNU.sparse.size", b"8388608")]) + file("big", b"data") + END
    (root,) = Images(home).lowers(made(home, [hole]).digest)
    facts = (root / "big").stat()
    assert facts.st_size == 8 << 20 and facts.st_blocks * 512 < 1 << 20
    assert (root / "big").read_bytes()[1 << 20 :][:5] == b"data\0"


@pytest.mark.parametrize(("call", "number"), [("setxattr", errno.ENOTSUP), ("mknod", errno.EPERM)])
def test_where_layers_cannot_be_stacked(home: Home, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """A file system without user attributes, and one that is an overlay itself: one folder then holds all."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    image = made(home, [BASE, SECOND])
    monkeypatch.setattr(os, call, refuse)
    images = Images(home)
    (root,) = images.lowers(image.digest)
    assert (root / "usr/lib/through").read_bytes() == b"through" and images.lower_paths(image.digest) == (root,)
    images.remove("x")
    assert not root.exists()


def test_another_process_that_unpacks_the_same(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder appears between the look and the rename."""
    image = made(home, [BASE, SECOND])
    images = Images(home)
    sync = roots._sync

    def first(path: Path) -> None:
        sync(path)
        lower = images.lower_paths(image.digest)[-1]
        shutil.copytree(path / lower.parent.name, lower.parent, symlinks=True)

    monkeypatch.setattr(roots, "_sync", first)
    assert all(path.exists() for path in images.lowers(image.digest))
    assert list(home.tmp.iterdir()) == []
