"""What a machine wrote, as a layer: the same after a way through overlayfs, a tar and back."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from missing import lacks

from trivisor.core.errors import ImageError
from trivisor.images.layer import apply
from trivisor.images.limits import DEFAULT, Limits
from trivisor.images.pack import PackedLayer
from trivisor.images.stream import Section, unpack
from trivisor.images.tree import Tree
from trivisor.images.upper import inside, pack
from trivisor.images.view import FolderView, everything


class Overlay:
    """A mounted overlayfs, and what it is made of."""

    def __init__(self, root: Path) -> None:
        self.lower, self.upper, self.merged = root / "lower", root / "upper", root / "merged"
        for folder in (self.lower, self.upper, self.merged, root / "work"):
            folder.mkdir()
        self._options = f"lowerdir={self.lower},upperdir={self.upper},workdir={root / 'work'},redirect_dir=on"

    def mount(self) -> None:
        command = ["mount", "-t", "overlay", "overlay", "-o", self._options, str(self.merged)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            lacks("needs to mount an overlayfs")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.merged)], check=False, capture_output=True)

    def pack(self, **more: object) -> PackedLayer:
        return pack(self.upper, [self.lower], self.upper.parent / "layer", **more)  # type: ignore[arg-type]


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    overlay = Overlay(tmp_path)
    yield overlay
    overlay.unmount()


def fill(root: Path) -> None:
    for name in ("a", "b", "d/x", "d/e/y", "d/e/z", "f/g/h", "k/l"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link").symlink_to("d/./x")


def listing(root: Path) -> dict[str, object]:
    view = FolderView(root)
    top = view.at("")
    assert top is not None
    return {
        node.path: (node.kind, node.mode, node.uid, node.target, node.open().read() if node.kind == "f" else b"")
        for node in everything(view, top)
    }


def applied(overlay: Overlay, layer: PackedLayer) -> dict[str, object]:
    """Return what the lower folder is with the layer over it, by the rules for images."""
    view = FolderView(overlay.lower)
    top = view.at("")
    assert top is not None
    plain = overlay.upper.parent / "plain.tar"
    subprocess.run(["tar", "-C", str(overlay.lower), "-cf", str(plain), "."], check=True)
    tree = Tree(DEFAULT, "test")
    whole: list[bytes] = []
    for number, path in enumerate((plain, layer.path)):
        tree.layer = number
        with path.open("rb") as file:
            size = path.stat().st_size
            apply(tree, unpack(Section(file.fileno(), 0, size, path.name), DEFAULT), number, DEFAULT, layered=True)
            whole.append(drain(Section(file.fileno(), 0, size, path.name)))
    found: dict[str, object] = {"": ("d", tree.root.mode, tree.root.uid, "", b"")}
    for path, node in tree.walk():
        content = node.content
        data = whole[content.source][content.position : content.position + content.size] if content else b""
        found[path] = (node.kind, node.mode, node.uid, node.target, data)
    return found


def drain(section: Section) -> bytes:
    stream, out = unpack(section, DEFAULT), b""
    while data := stream.read(1 << 20):
        out += data
    return out


def test_changes(overlay: Overlay) -> None:
    fill(overlay.lower)
    overlay.mount()
    root = overlay.merged
    (root / "a").unlink()
    (root / "b").write_text("new")
    shutil.rmtree(root / "d/e")
    (root / "d/e").mkdir()
    (root / "d/e/new").write_text("n")
    (root / "f").rename(root / "moved")
    (root / "moved/g/h").unlink()
    (root / "k").rename(root / "k2")
    (root / "k").mkdir()
    os.link(root / "b", root / "same")
    os.mkfifo(root / "pipe")
    os.chown(root / "pipe", 5, 6)
    overlay.unmount()
    layer = overlay.pack()
    overlay.mount()
    assert applied(overlay, layer) == listing(root)
    with layer.path.open("rb") as file:
        names = subprocess.run(["tar", "-tz"], stdin=file, check=True, capture_output=True, text=True).stdout.split()
    assert {".wh.a", "d/e/.wh..wh..opq", ".wh.f", "k/.wh..wh..opq"} <= set(names)
    assert "moved/.wh..wh..opq" not in names


@pytest.mark.parametrize("seed", range(8))
def test_any_changes(overlay: Overlay, seed: int) -> None:
    """Whatever was done, the layer does it to the image again."""
    fill(overlay.lower)
    overlay.mount()
    chance = random.Random(seed)
    for number in range(60):
        change(overlay.merged, chance, number)
    overlay.unmount()
    layer = overlay.pack()
    overlay.mount()
    assert applied(overlay, layer) == listing(overlay.merged)


def change(root: Path, chance: random.Random, number: int) -> None:
    places = sorted(path for path in root.rglob("*"))
    folders = [root, *(path for path in places if path.is_dir() and not path.is_symlink())]
    target = chance.choice(folders) / chance.choice("abdefgk")
    kind = chance.choice(("write", "mkdir", "remove", "rename", "link", "chmod"))
    victim = chance.choice(places) if places else root
    try:
        if kind == "write":
            target.write_text(str(number))
        elif kind == "mkdir":
            target.mkdir()
        elif kind == "remove":
            shutil.rmtree(victim) if victim.is_dir() and not victim.is_symlink() else victim.unlink()
        elif kind == "rename":
            victim.rename(target)
        elif kind == "link":
            target.symlink_to(f"../{number}")
        elif kind == "chmod" and not victim.is_symlink():
            victim.chmod(0o700 + number % 64)
    except OSError:
        pass  # not every change is possible


def test_what_is_left_out_and_how_old(overlay: Overlay) -> None:
    fill(overlay.lower)
    (overlay.upper / "etc").mkdir()
    (overlay.upper / "etc/hosts").write_text("x")
    (overlay.upper / "etc/kept").write_text("x")
    os.utime(overlay.upper / "etc/kept", (5, 5))
    os.mknod(overlay.upper / "device", 0o020644, os.makedev(1, 3))
    found = applied(overlay, overlay.pack(without=["/etc/hosts"], latest=3))
    assert "etc/kept" in found
    assert "etc/hosts" not in found
    assert "device" not in found


def test_the_same_twice(overlay: Overlay) -> None:
    (overlay.upper / "x").write_text("x")
    one = overlay.pack(latest=0)
    one.path.unlink()
    os.utime(overlay.upper / "x")
    assert overlay.pack(latest=0) == one


def test_ids(overlay: Overlay) -> None:
    turn = inside([(0, 1000, 1), (1, 5000, 10)])
    assert [turn(number) for number in (1000, 5000, 5009, 5010, 0)] == [0, 1, 10, 65534, 65534]
    (overlay.upper / "x").write_text("x")
    os.chown(overlay.upper / "x", 5004, 1000)
    found = applied(overlay, overlay.pack(users=[(0, 1000, 1), (1, 5000, 10)], groups=[(0, 1000, 1)]))
    assert found["x"] == ("f", 0o644, 5, "", b"x")


def test_too_much(overlay: Overlay) -> None:
    (overlay.upper / "x").write_bytes(bytes(100))
    with pytest.raises(ImageError, match="more than an image may"):
        overlay.pack(limits=Limits(total=50))
