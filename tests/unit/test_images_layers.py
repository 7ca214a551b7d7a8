"""Images of several layers: what `docker save` writes, and OCI layouts, in every form that tools give them."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import zstandard
from squash_support import contents, imported, left, listing, make_home
from tar_maker import END, block, file, folder, hardlink, symlink

from trivisor.core.errors import ImageError
from trivisor.images.catalog import Images

BASE = (
    folder("etc")
    + file("etc/a", b"base a")
    + file("etc/b", b"base b")
    + folder("var")
    + folder("var/cache")
    + file("var/cache/x", b"x")
    + file("var/cache/y", b"y")
    + folder("usr/lib")
    + symlink("lib", "usr/lib")
    + file("usr/lib/old", b"old")
    + hardlink("usr/lib/hard", "usr/lib/old")
    + END
)
SECOND = (
    file("etc/.wh.a")
    + folder("var/cache")
    + file("var/cache/new", b"new")
    + file("var/cache/.wh..wh..opq")  # after the new one: it hides the layers below, not this
    + file("lib/through", b"through")
    + file("usr/lib/.wh.old")
    + file("usr/lib/old", b"replaced")
    + file(".wh..wh.plnk")
    + END
)
THIRD = file(".wh.etc") + folder("etc") + file("etc/c", b"c") + block("var/cache", "3") + END
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "Env": ["PATH=/bin", "A=b=c"],
        "Cmd": ["sh"],
        "Entrypoint": None,
        "User": "1000:1000",
        "WorkingDir": "/srv",
        "Labels": {"x": "y"},
    },
    "rootfs": {"type": "layers", "diff_ids": []},
}


PACKINGS = {b"\x1f\x8b": gzip.decompress, b"\x28\xb5\x2f\xfd": zstandard.decompress}


def with_diffs(config: dict[str, Any], layers: list[bytes]) -> bytes:
    """The config of an image of these layers."""
    plain = [next((unpack(one) for magic, unpack in PACKINGS.items() if one.startswith(magic)), one) for one in layers]
    diffs = [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in plain]
    return json.dumps({**config, "rootfs": {"type": "layers", "diff_ids": diffs}}).encode()


def saved(layers: list[bytes], tags: list[str] | None = None, config: dict[str, Any] = CONFIG) -> bytes:
    """What `docker save` of an old Docker writes."""
    manifest = [{"Config": "c.json", "RepoTags": tags, "Layers": [f"{n}/layer.tar" for n in range(len(layers))]}]
    data = b"".join(folder(f"{n}/") + file(f"{n}/layer.tar", layer) for n, layer in enumerate(layers))
    return data + file("c.json", with_diffs(config, layers)) + file("manifest.json", json.dumps(manifest).encode()) + END


def blob(data: bytes, media: str) -> tuple[bytes, dict[str, Any]]:
    digest = hashlib.sha256(data).hexdigest()
    return file(f"blobs/sha256/{digest}", data), {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}


def layout(layers: list[bytes], *, nested: bool = True, config: dict[str, Any] = CONFIG) -> bytes:
    """An OCI layout, its manifest in an index with another platform's."""
    packed = [blob(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers]
    config_blob = blob(with_diffs(config, layers), "application/vnd.oci.image.config.v1+json")
    manifest = {"schemaVersion": 2, "config": config_blob[1], "layers": [one[1] for one in packed]}
    parts = [*packed, config_blob, blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")]
    if nested:
        other = {**parts[-1][1], "digest": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "arm64"}}
        this = {**parts[-1][1], "platform": {"os": "linux", "architecture": "amd64"}}
        parts.append(blob(json.dumps({"manifests": [other, this]}).encode(), "application/vnd.oci.image.index.v1+json"))
    index = {"schemaVersion": 2, "manifests": [parts[-1][1]]}
    head = file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}') + file("index.json", json.dumps(index).encode())
    return head + b"".join(part[0] for part in parts) + END


def check_two(image: Any) -> None:
    found = listing(image)
    assert "etc/a" not in found and contents(image, "etc/b") == b"base b"
    assert [name for name in found if name.startswith("var/cache/")] == ["var/cache/new"]
    assert contents(image, "usr/lib/through") == b"through"
    assert contents(image, "usr/lib/old") == b"replaced" and contents(image, "usr/lib/hard") == b"old"
    assert found["lib"].endswith(" -> usr/lib")
    assert not [name for name in found if ".wh." in name]
    config = image.config
    assert config.env == {"PATH": "/bin", "A": "b=c"} and config.cmd == ["sh"] and config.entrypoint == []
    assert config.user == "1000:1000" and config.workdir == "/srv" and config.labels == {"x": "y"}


@pytest.mark.parametrize("pack", ["plain", "gzip", "layers-gzip", "layers-zstd"])
def test_docker_save(tmp_path: Path, pack: str) -> None:
    inner = {"layers-gzip": gzip.compress, "layers-zstd": zstandard.compress}.get(pack, bytes)
    data = saved([inner(BASE), inner(SECOND)])
    check_two(imported(tmp_path, gzip.compress(data) if pack == "gzip" else data))
    assert left(make_home(tmp_path)) == []


@pytest.mark.parametrize("pack", ["plain", "gzip", "layers-gzip", "layers-zstd", "folder", "flat"])
def test_oci_layout(tmp_path: Path, pack: str) -> None:
    inner = {"layers-gzip": gzip.compress, "layers-zstd": zstandard.compress}.get(pack, bytes)
    data = layout([inner(BASE), inner(SECOND)], nested=pack != "flat")
    if pack == "folder":
        (tmp_path / "a.tar").write_bytes(data)
        (tmp_path / "layout").mkdir()
        subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path / "layout"], check=True)
        check_two(Images(make_home(tmp_path)).import_(tmp_path / "layout", "x"))
    else:
        check_two(imported(tmp_path, gzip.compress(data) if pack == "gzip" else data))


def test_a_third_layer_hides_whole_folders(tmp_path: Path) -> None:
    image = imported(tmp_path, saved([BASE, SECOND, THIRD]))
    found = listing(image)
    assert [name for name in found if name.startswith("etc/")] == ["etc/c"]
    assert "var" in found and "var/cache" not in found


def test_layers_that_are_links_to_others(tmp_path: Path) -> None:
    """Old Dockers write a layer that two images share once, and a link to it."""
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": ["one/layer.tar", "two/layer.tar"]}]
    data = folder("one") + file("one/layer.tar", BASE) + folder("two") + symlink("two/layer.tar", "../one/layer.tar")
    data += file("c.json", with_diffs(CONFIG, [BASE, BASE])) + file("manifest.json", json.dumps(manifest).encode()) + END
    assert contents(imported(tmp_path, data), "etc/a") == b"base a"


def test_one_of_several_images_by_name(tmp_path: Path) -> None:
    layers = {"1": BASE, "2": file("only-y") + END}
    named = (("x:latest", "1"), ("y:2", "2"))
    manifest = [{"Config": f"{n}.json", "RepoTags": [name], "Layers": [f"{n}.tar"]} for name, n in named]
    data = b"".join(file(f"{n}.tar", layer) + file(f"{n}.json", with_diffs(CONFIG, [layer])) for n, layer in layers.items())
    data += file("manifest.json", json.dumps(manifest).encode()) + END
    assert "etc/a" in listing(imported(tmp_path, data))
    images = Images(make_home(tmp_path))
    assert "only-y" in listing(images.import_(tmp_path / "archive", "y:2"))
    with pytest.raises(ImageError) as caught:
        images.import_(tmp_path / "archive", "z")
    assert "x:latest, y:2" in caught.value.hint


def test_a_root_that_has_such_files_is_a_root(tmp_path: Path) -> None:
    data = folder("etc") + file("manifest.json", b"[]") + END
    assert "manifest.json" in listing(imported(tmp_path, data))


def foreign() -> bytes:
    config, described = blob(json.dumps(CONFIG).encode(), "application/vnd.oci.image.config.v1+json")
    layer = {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": "sha256:" + "1" * 64, "size": 5}
    manifest, pointer = blob(json.dumps({"config": described, "layers": [layer]}).encode(), "application/vnd.oci.image.manifest.v1+json")
    index = json.dumps({"manifests": [pointer]}).encode()
    return file("oci-layout", b"{}") + file("index.json", index) + config + manifest + END


BAD = {
    "no-layer": (saved([BASE]).replace(b'"0/layer.tar"', b'"9/layer.tar"'), "not in the archive"),
    "json": (file("manifest.json", b"{") + END, "malformed"),
    "json-kind": (file("manifest.json", b'[{"Config": 1, "Layers": []}]') + END, "malformed"),
    "json-nested": (file("manifest.json", b"[" * 100_000) + END, "malformed"),
    "json-huge": (file("manifest.json", b" " * (5 << 20)) + END, "over the limit"),
    "none": (file("manifest.json", b"[]") + END, "0 images"),
    "config-out": (file("manifest.json", b'[{"Config": "../../etc/passwd", "Layers": []}]') + END, "not in the archive"),
    "platform": (saved([BASE], config={**CONFIG, "architecture": "arm64"}), "linux/arm64"),
    "windows": (saved([BASE], config={**CONFIG, "os": "windows"}), "windows/amd64"),
    "layer-hostile": (saved([BASE, file("../x") + END]), "'..'"),
    "layer-truncated": (saved([BASE, SECOND[:2000]]), "truncated"),
    "layer-device": (saved([BASE, block("sda", "4", device=(8, 0)) + END]), "device node"),
    "whiteout-of-nothing": (saved([BASE, file(".wh.") + END]), "whiteout of nothing"),
    "whiteout-dotdot": (saved([BASE, file("etc/.wh...") + END]), "whiteout of nothing"),
    "oci-digest": (layout([BASE]).replace(b"base a", b"BASE A"), "damaged"),
    "oci-other-platforms": (layout([BASE]).replace(b'"amd64"', b'"arm64"'), "damaged|0 images|arm64"),
    "oci-foreign": (foreign(), "foreign"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives(tmp_path: Path, case: str) -> None:
    data, why = BAD[case]
    with pytest.raises(ImageError, match=why):
        imported(tmp_path, data)
    assert left(make_home(tmp_path)) == []


def test_layers_are_merged_as_by_a_slow_and_plain_model(tmp_path: Path) -> None:
    """Random layers, against a dictionary of paths with the rules written out one by one."""
    random_ = random.Random(6)
    names = ["a", "b", "a/x", "a/y", "a/z/q", "b/x", "a/z", "c"]
    for round_ in range(25):
        layers, model = [], {}
        for number in range(3):
            data, fresh = b"", {}
            for name in random_.sample(names, 4):
                kind = random_.choice("fdw")
                parents = [name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)]
                if any(fresh.get(parent, model.get(parent)) not in (None, "d") for parent in parents):
                    continue
                if name in fresh or any(other.startswith(name + "/") for other in fresh):
                    continue
                base, _, leaf = name.rpartition("/")
                if kind == "w":
                    data += file(f"{base}/.wh.{leaf}" if base else f".wh.{leaf}")
                    model = {path: what for path, what in model.items() if path != name and not path.startswith(name + "/")}
                    fresh[name] = None
                elif kind == "d":
                    data += folder(name)
                    fresh[name] = "d"
                else:
                    text = f"{number} {name}".encode()
                    data += file(name, text)
                    model = {path: what for path, what in model.items() if not path.startswith(name + "/")}
                    fresh[name] = text
                for parent in parents if kind != "w" else ():
                    if fresh.get(parent) is None:
                        fresh[parent] = "d"
            model.update(fresh)
            model = {path: what for path, what in model.items() if what is not None}
            layers.append(data + END)
        folder_ = tmp_path / str(round_)
        folder_.mkdir()
        image = imported(folder_, saved([file("keep") + END, *layers]))
        found = {name: mode for name, mode in listing(image).items() if name not in ("/", "keep", "proc", "sys", "dev", "run", "tmp")}
        assert {name: mode[0] for name, mode in found.items()} == {name: "d" if what == "d" else "-" for name, what in model.items()}, (
            layers
        )
        for name, what in model.items():
            if what != "d":
                assert contents(image, name) == what
