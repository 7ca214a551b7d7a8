"""Homes made before images were OCI images: a name meant a squashfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from images_for_tests import mini_image
from squash_support import left, make_home
from test_images_lowers import shown

from trivisor.core.errors import ImageError
from trivisor.core.paths import Home
from trivisor.images.catalog import Image, Images

CONFIG = {"env": {"A": "b=c"}, "cmd": ["sh"], "user": "1000", "workdir": "/srv"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def older_image(home: Home, name: str = "old") -> Image:
    """Write down an image as homes had them: the mini image's squashfs, and a config of our own."""
    images = Images(home)
    squashfs = images.rootfs(mini_image(home, "source").digest)
    with images.workspace() as work:
        digest = images.store.add(squashfs, work.owner)
        value = {"size": squashfs.stat().st_size, "created": 123.0, "source": "/root.tar", "config": CONFIG}
        images.store.set_ref(f"image:{name}:latest", digest, value)
    images.remove("source")
    return images.get(name)


def test_it_goes_on_as_it_is(home: Home) -> None:
    image = older_image(home)
    images = Images(home)
    assert [one.name for one in images.list()] == ["old:latest"] and images.get("old") == image
    assert image.config.env == {"A": "b=c"} and image.config.cmd == ["sh"] and image.config.user == "1000"
    assert images.rootfs(image.digest) == images.store.path(image.digest) == image.rootfs
    (root,) = images.lowers(image.digest)
    assert (root / "etc/os-release").exists() and images.check() == []
    images.remove("old")
    assert not root.exists() and images.list() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read owners out of a squashfs")
def test_it_becomes_an_oci_image_when_one_is_needed(home: Home) -> None:
    image = older_image(home)
    images = Images(home)
    images.tag("old", "second")
    images.pin(image, "machine:x")
    before = shown(images.lowers(image.digest))
    documents = images.documents(image.digest)
    now = images.get("old")
    assert now.digest == images.get("second").digest == documents.digest != image.digest
    assert now.config.env == image.config.env and now.config.workdir == "/srv" and (now.created, now.source) == (123.0, "/root.tar")
    assert images.rootfs(now.digest).samefile(images.rootfs(image.digest))
    assert {name: facts[:-1] for name, facts in shown(images.lowers(now.digest)).items()} == {
        name: facts[:-1] for name, facts in before.items()
    }
    assert Images(home).documents(image.digest).digest == now.digest  # a machine's digest is still the old one
    root = images.rootfs(image.digest)
    images.remove("old")
    images.remove("second")
    assert root.exists()
    images.unpin("machine:x")
    images.collect()
    assert not root.exists() and left(home) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="needs to be run without root, whom nothing is withheld from")
def test_without_root_it_says_why_not(home: Home) -> None:
    with pytest.raises(ImageError, match="an older Trivisor made it"):
        Images(home).documents(older_image(home).digest)
