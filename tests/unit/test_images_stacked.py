"""Roots of virtual machines that are made out of those of the layers below: what the guest's overlayfs shows is what the layers say."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from squash_support import make_home, unpacked
from tar_maker import END, file
from test_images_layers import BASE, SECOND, THIRD
from test_images_lowers import CASES, made, shown

from trivisor.core.errors import ImageError
from trivisor.core.paths import Home
from trivisor.images import stacked
from trivisor.images.catalog import Images

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and whiteouts are unpacked")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def grown(home: Home, layers: list[bytes], target: Path) -> list[int]:
    """Make the root of each image with one layer more; see that it shows what a whole one does. Return of how many squashfs each is."""
    images = Images(home)
    digests, counts = [], []
    for count in range(1, len(layers) + 1):
        digests.append(made(home, layers[:count], f"grown{count}").digest)
        counts.append(len(stacked.pieces(images.passing_rootfs(digests[-1]))) + 1)
    root = images.passing_rootfs(digests[-1])
    assert root == images.root_path(digests[-1], passing=True)[0]
    found, listed = shown(unpacked(root, target / "grown")), entries(root)
    root = images.rootfs(digests[-1])
    assert not stacked.pieces(root)
    assert root == images.passing_rootfs(digests[-1])  # which is as good
    assert (found, listed) == (shown(unpacked(root, target / "whole")), entries(root))
    assert list(home.tmp.iterdir()) == []
    return counts


def entries(root: Path) -> list[object]:
    """What the index beside a root says."""
    return sorted(tuple(entry[:7]) for entry in msgspec.msgpack.decode((root.parent / stacked.INDEX).read_bytes()))


def test_three_layers(home: Home, tmp_path: Path) -> None:
    assert grown(home, [BASE, SECOND, THIRD], tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_whole(home: Home, tmp_path: Path, name: str) -> None:
    # To a file of a layer below that has to be written again; a root folder that belongs to one who has nothing else.
    whole = name in ("link-to-below", "link-to-below-through", "setuid", "root")
    assert (1 in grown(home, CASES[name], tmp_path)[1:]) == whole


def test_there_are_not_too_many(home: Home, tmp_path: Path) -> None:
    layers = [file(f"f{number}", b"x") + file(f".wh.f{number - 1}") + END for number in range(stacked.MOST + 3)]
    counts = grown(home, layers, tmp_path)
    assert counts == [*range(1, stacked.MOST + 1), *[stacked.MOST] * 3]


def test_what_is_not_to_be_built_upon(home: Home, tmp_path: Path) -> None:
    """A root without its index, or with one that says nothing, is as if it were not there; one that is cut is an error."""
    images = Images(home)
    first = images.rootfs(made(home, [BASE], "a").digest)
    digest = made(home, [BASE, SECOND], "b").digest
    for index in (b"\x91\x01", None):
        (first.parent / stacked.INDEX).unlink()
        if index is not None:
            (first.parent / stacked.INDEX).write_bytes(index)
        assert images.passing_rootfs(digest) == images.rootfs_path(digest)
        assert not stacked.pieces(images.rootfs(digest))
        images._derived.drop({images.key(digest)})
    for data in (b"", b"hsqs", first.read_bytes()[:-4096], first.read_bytes() + bytes(4096)):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(ImageError, match="no squashfs"):
            stacked.pieces(tmp_path / "bad")
