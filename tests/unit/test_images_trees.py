"""Unpacked roots, and the host's own root as an image."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from images_for_tests import mini_image
from squash_support import make_home

from trivisor.core.errors import InvalidSpec, NotFound
from trivisor.core.paths import Home
from trivisor.images import host
from trivisor.images.catalog import Images


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def test_a_tree_is_made_once_and_is_the_image(home: Home) -> None:
    image = mini_image(home)
    images = Images(home)
    assert not images.lower_paths(image.digest)[0].exists()
    said: list[str] = []
    tree = images.lowers(image.digest, said.append)[0]
    assert tree == images.lower_paths(image.digest)[0] and said
    assert (tree / "etc/os-release").read_text() == 'ID=mini\nPRETTY_NAME="mini"\n'
    assert stat.S_IMODE((tree / "tmp").stat().st_mode) == 0o1777
    if os.geteuid() == 0:
        assert (tree / "home/user").stat().st_uid == 1000
        assert images.tree_lacks(image.digest) == ""
    else:
        assert "owners" in images.tree_lacks(image.digest)
    before = tree.stat().st_ino
    assert images.lowers(image.digest, said.append)[0].stat().st_ino == before and said.count(said[-1]) == 1
    assert list(home.tmp.iterdir()) == []


def test_many_who_want_it_at_once_make_it_once(home: Home) -> None:
    image = mini_image(home)
    said: list[str] = []
    threads = [threading.Thread(target=lambda: Images(home).lowers(image.digest, said.append)[0]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said and len(said) == len(set(said))
    assert (Images(home).lower_paths(image.digest)[0] / "bin/sh").exists()


def test_a_tree_goes_with_its_image(home: Home) -> None:
    image = mini_image(home)
    images = Images(home)
    tree = images.lowers(image.digest)[0]
    assert images.sweep(set) == []
    images.remove("mini")
    assert not tree.exists()
    with pytest.raises(NotFound):
        images.lowers(image.digest)[0]
    images.sweep(set)
    assert list((home.cache / "trees").iterdir()) == []


def test_the_sweep_removes_what_nothing_names(home: Home) -> None:
    images = Images(home)
    old = home.cache / "trees/host-0123"
    (old / "root").mkdir(parents=True)
    current = images.lowers(images.get("host").digest)[0]
    assert images.sweep(lambda: ["host:0123"]) == [] and old.exists()
    assert len(images.sweep(set)) == 1
    assert not old.exists() and current.exists()


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A host with things that must not be seen."""
    root = tmp_path / "host"
    for name in ("usr/bin", "opt", "etc/ssl/certs", "etc/ssl/private", "etc/ssh", "root/.ssh", "home/me", "run", "tmp", "etc/alternatives"):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    for name in ("shadow", "gshadow", "ssl/private/key.pem", "ssh/ssh_host_rsa_key", "sudoers", "passwd", "ssl/certs/ca.pem", "group"):
        (root / "etc" / name).write_text(name)
        (root / "etc" / name).chmod(0o644)
    (root / "etc/ssl/certs/own.key").write_text("secret")
    (root / "etc/ssl/certs/own.key").chmod(0o600)
    (root / "etc/alternatives/awk").symlink_to("/usr/bin/mawk")
    os.mkfifo(root / "etc/ssl/certs/fifo")
    return root


def test_the_hosts_root_is_an_allow_list(etc: Path, tmp_path: Path) -> None:
    root = tmp_path / "made"
    host.build(root, etc)
    files = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert files == {"bin", "etc/passwd", "etc/group", "etc/ssl/certs/ca.pem", "etc/alternatives/awk", "var/run"}
    assert (root / "bin").readlink() == Path("usr/bin")
    assert host.folders(etc) == (etc / "usr", etc / "opt")
    assert all((root / path.relative_to(etc)).is_dir() for path in host.folders(etc))
    assert stat.S_IMODE((root / "root").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "var/tmp").stat().st_mode) == 0o1777


def test_its_digest_follows_the_host(etc: Path) -> None:
    before = host.digest(etc)
    assert before == host.digest(etc) and before.startswith(host.PREFIX)
    (etc / "etc/passwd").write_text("somebody else")
    assert host.digest(etc) != before


def test_the_name_is_the_hosts(home: Home) -> None:
    images = Images(home)
    image = images.get("host")
    assert image.digest == host.digest() and image.rootfs == Path("/")
    assert (images.lowers(image.digest)[0] / "etc/passwd").exists()
    images.pin(image, "machine:x")  # nothing of the store to pin
    images.unpin("machine:x")
    with pytest.raises(InvalidSpec):
        images.import_(Path("/nowhere"), "host")


@pytest.mark.parametrize(
    "folder",
    ["/", "/root", "/home", "/etc/ssl", "/run/x", "/tmp", "/var/tmp", "/proc/self", "{home}", "{home}/machines", "{above}", "~"],
)
def test_working_folders_that_are_not_shared(home: Home, folder: str) -> None:
    path = Path(folder.format(home=home.root, above=home.root.parent)).expanduser()
    assert host.withheld(path, home.root)


def test_working_folders_that_are(home: Home, tmp_path: Path) -> None:
    assert host.withheld(tmp_path / "project", home.root) == ""
    assert host.withheld(Path("~/project").expanduser(), home.root) == ""
    assert host.withheld(Path("/srv/project"), home.root) == ""


def test_a_folder_with_the_home_in_it_is_no_part_of_the_root(etc: Path) -> None:
    (etc / "opt/trivisor").mkdir()
    assert host.folders(etc, hidden=etc / "opt/trivisor") == (etc / "usr",)
