"""Unpacking by an ordinary user: with subordinate ids owners are kept, without them it is said that they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rootless_home import NOBODY, _reachable, account, as_user
from tar_maker import END, block, file, folder, hardlink
from test_images_layers import saved

import trivisor
from trivisor.core.errors import ImageError
from trivisor.core.paths import Home
from trivisor.images.catalog import Images
from trivisor.images.view import StackView, everything
from trivisor.launch import ids

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
LAYERS = [
    folder("srv") + block("srv/db", "5", mode=0o700, uid=101, gid=102) + block("srv/db/a", mode=0o600, uid=101, gid=102)
    + block("srv/su", mode=0o4755) + block("srv/far", uid=4_000_000) + END,
    block("srv/db/b", mode=0o640, uid=103, gid=104) + hardlink("srv/db/c", "srv/db/a") + file("srv/.wh.su") + END,
]  # fmt: skip


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may reach."""
    _reachable()
    base = Path(tempfile.mkdtemp(prefix="user-"))
    base.chmod(0o777)
    yield base
    ids.remove_tree(base)


def interpreter() -> str:
    """Return a Python that ordinary users may run, with our packages: the one that runs the tests may lie in root's home."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    found = shutil.which(version, path="/usr/bin:/bin:/usr/local/bin")
    paths = [str(Path(module.__file__ or "").parents[1]) for module in (trivisor, msgspec)]
    program = "import sys; sys.path += sys.argv[1:]; import trivisor"
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", str(found), "-I", "-c", program, *paths]
    if found is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"needs a {version} that ordinary users may run")
    return found


def prepared(place: Path, layers: list[bytes]) -> Path:
    (place / "archive").write_bytes(saved(layers))
    (place / "archive").chmod(0o644)
    return place / "home"


def test_subordinate_ids_keep_owners(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = interpreter()
    root = prepared(place, LAYERS)
    look = place / "look.py"
    look.write_text("import os, sys\nfor name in sys.argv[1:]:\n    s = os.lstat(name)\n    print(oct(s.st_mode), s.st_uid, s.st_gid)\n")

    def work() -> None:
        home = Home(root)
        home.open()
        if ids.probe(root).kind != "subids":
            (place / "skipped").touch()
            return
        monkeypatch.setattr(sys, "executable", python)
        images, said = Images(home), list[str]()
        image = images.import_(place / "archive", "x")
        lowers = images.lowers(image.digest, said.append)
        assert said[0] == "unpacking 2 of 2 layers" and "beyond" in said[1] and "beyond" in images.tree_lacks(image.digest)
        (place / "lowers").write_text("\n".join(map(str, lowers)))
        assert (lowers[1] / "srv/su").stat().st_mode & 0o7777 == 0o4755
        assert {path.name for path in home.tmp.iterdir()} == set()
        assert (lowers[1] / "srv/db").stat().st_uid >= 100_000
        names = [f"{lowers[1]}/srv/{name}" for name in ("db", "db/a")] + [f"{lowers[0]}/srv/db{name}" for name in ("", "/b", "/c")]
        ids.run_as_root(["/bin/sh", "-c", 'out=$1; shift; exec "$@" > "$out"', "sh", str(place / "seen"), python, str(look), *names])
        images.remove("x")
        assert not any(lower.exists() for lower in lowers)

    with account() as user:
        as_user(user, work)
    if (place / "skipped").exists():
        pytest.skip("needs a host that gives an account subordinate ids")
    seen = (place / "seen").read_text().splitlines()
    # The second layer's folder has the owner that the first says; its hard link is one file with the first layer's.
    assert seen[0].split() == ["0o40700", "101", "102"] == seen[2].split()
    assert seen[1].split() == ["0o100600", "101", "102"] == seen[4].split()
    assert seen[3].split() == ["0o100640", "103", "104"]


def test_what_is_refused_is_refused_there_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = interpreter()
    root = prepared(place, LAYERS)

    def work() -> None:
        home = Home(root)
        home.open()
        monkeypatch.setattr(sys, "executable", python)
        images = Images(home)
        image = images.import_(place / "archive", "x")
        blob = images.store.path(image.layers[1].digest)
        blob.chmod(0o600)
        blob.write_bytes(blob.read_bytes().replace(b"srv/db/b", b"srv/../b"))
        with pytest.raises(ImageError, match=r"\.\.|checksum"):
            images.lowers(image.digest)
        assert list(home.tmp.iterdir()) == []

    with account() as user:
        as_user(user, work)


def test_without_them_it_is_said(place: Path) -> None:
    root = prepared(place, LAYERS)

    def work() -> None:
        home = Home(root)
        home.open()
        images, said = Images(home), list[str]()
        image = images.import_(place / "archive", "x")
        lowers = images.lowers(image.digest, said.append)
        assert said[-1] == images.tree_lacks(image.digest) and "owners" in said[-1]
        view = StackView(lowers)
        top = view.at("")
        assert top is not None
        nodes = {node.path: node for node in everything(view, top)}
        assert {node.uid for node in nodes.values()} == {NOBODY} and nodes["srv/db"].mode == 0o700
        assert "srv/su" not in nodes and (lowers[1] / "srv/su").stat().st_mode & 0o7777 == 0o755
        images.remove("x")
        assert not any(lower.exists() for lower in lowers)

    as_user(NOBODY, work)
