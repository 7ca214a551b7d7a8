"""The documents of images, what is refused of them, and the one door by which images are registered."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from images_for_tests import layered_image
from squash_support import imported, left, make_home
from tar_maker import END, block, file, folder

from trivisor.core.errors import ImageError, InvalidSpec, NotFound, TrivisorError
from trivisor.core.paths import Home
from trivisor.core.units import MIB
from trivisor.images import layers, model
from trivisor.images.catalog import Images
from trivisor.images.limits import Limits
from trivisor.images.model import Descriptor, Platform
from trivisor.images.pack import LayerWriter, PackedLayer

DIGEST = "sha256:" + "a" * 64


def manifest(**changes: Any) -> bytes:
    config = {"mediaType": model.OCI_CONFIG, "digest": DIGEST, "size": 2}
    layer = {"mediaType": model.OCI_LAYER_GZIP, "digest": DIGEST, "size": 5}
    return json.dumps({"schemaVersion": 2, "mediaType": model.OCI_MANIFEST, "config": config, "layers": [layer], **changes}).encode()


def layer_of(kind: str, **changes: Any) -> list[dict[str, Any]]:
    return [{"mediaType": kind, "digest": DIGEST, "size": 5, **changes}]


@pytest.mark.parametrize("kind", model.LAYERS)
def test_layers_that_are_read(kind: str) -> None:
    assert model.read_manifest(manifest(layers=layer_of(kind)), model.OCI_MANIFEST, "x").layers[0].media_type == kind


BAD = {
    "nothing": (b"", "", "malformed"),
    "list": (b"[]", "", "malformed"),
    "deep": (b"[" * 100_000, "", "malformed"),
    "not-utf8": (b'{"config": "\xff"}', "", "malformed"),
    "huge": (b" " * (5 * MIB), "", "over the limit"),
    "index": (manifest(mediaType=model.OCI_INDEX), "", "not the manifest of an image"),
    "index-by-header": (manifest(), model.DOCKER_INDEX, "not the manifest of an image"),
    "schema-1": (b"{}", "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
    "artifact": (
        manifest(config={"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": DIGEST, "size": 2}),
        "",
        "not an image",
    ),
    "digest": (manifest(layers=layer_of(model.OCI_LAYER, digest="sha256:../../x")), "", "not a digest"),
    "sha512": (manifest(layers=layer_of(model.OCI_LAYER, digest="sha512:" + "a" * 128)), "", "not a digest"),
    "size": (manifest(layers=layer_of(model.OCI_LAYER, size=-1)), "", "-1 bytes"),
    "size-huge": (manifest(layers=layer_of(model.OCI_LAYER, size=1 << 60)), "", "bytes"),
    "config-huge": (manifest(config={"mediaType": model.OCI_CONFIG, "digest": DIGEST, "size": 1 << 30}), "", "over the limit"),
    "foreign": (manifest(layers=layer_of("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")), "", "foreign layer"),
    "nondistributable": (manifest(layers=layer_of("application/vnd.oci.image.layer.nondistributable.v1.tar")), "", "foreign layer"),
    "encrypted": (manifest(layers=layer_of("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")), "", "not a layer"),
    "many": (manifest(layers=layer_of(model.OCI_LAYER) * 128), "", "over 127 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests(case: str) -> None:
    data, kind, why = BAD[case]
    with pytest.raises(ImageError, match=why):
        model.read_manifest(data, kind, "x")


def test_configs() -> None:
    read = model.read_manifest(manifest(), "", "x")
    whole = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
        "moby.buildkit.x": 1,
        "config": {
            "Env": ["A=1", "odd", "=x", "B=c=d"],
            "Volumes": {"/data": {}},
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGQUIT",
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5, "Retries": 2},
            "Labels": None,
            "OnBuild": ["RUN x"],
            "ArgsEscaped": True,
        },
        "history": [{"created_by": "RUN x", "empty_layer": True}],
    }
    config = model.read_config(json.dumps(whole).encode(), read, "x")
    assert config.env == {"A": "1", "B": "c=d"} and config.run.stop_signal == "SIGQUIT" and list(config.run.volumes or ()) == ["/data"]
    assert config.run.healthcheck is not None and config.run.healthcheck.test == ["CMD", "true"] and config.labels == {}
    assert model.decode(model.encode(config), model.ImageConfig, "x") == config
    for diffs in ([], [DIGEST, DIGEST], ["sha256:zz"]):
        with pytest.raises(ImageError):
            model.read_config(json.dumps({**whole, "rootfs": {"type": "layers", "diff_ids": diffs}}).encode(), read, "x")


def test_platforms() -> None:
    assert str(Platform.parse("amd64")) == "linux/amd64" == str(Platform.parse("linux/x86_64"))
    assert str(Platform.parse("linux/arm/v7")) == "linux/arm/v7"
    for bad in ("", "a/b/c/d", "linux/", "linux/ x"):
        with pytest.raises(InvalidSpec):
            Platform.parse(bad)

    def one(number: int, platform: Platform | None, **more: Any) -> Descriptor:
        return Descriptor(model.OCI_MANIFEST, f"sha256:{number:064}", 1, platform=platform, **more)

    there = [
        one(0, Platform("unknown", "unknown"), annotations={"vnd.docker.reference.type": "attestation-manifest"}),
        *(one(number, Platform.parse(name)) for number, name in enumerate(("arm64", "amd64", "windows/amd64", "linux/arm/v7"), 1)),
    ]
    assert model.choose(there, Platform("amd64"), "x") is there[2] and model.choose(there, Platform.parse("linux/arm/v7"), "x") is there[4]
    with pytest.raises(ImageError) as caught:
        model.choose(there, Platform("riscv64"), "x")
    assert "linux/amd64, linux/arm/v7, linux/arm64, windows/amd64" in caught.value.hint


# Packing


def packed(tmp_path: Path, data: bytes, step: int) -> PackedLayer:
    with LayerWriter(tmp_path / str(step)) as layer:
        for at in range(0, len(data), step):
            layer.write(data[at : at + step])
        return layer.close()


def test_a_packed_layer_is_one_gzip_file_whatever_the_pieces(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(700_000) + bytes(3_000_000) + random.Random(1).randbytes(700_000) * 2
    results = [packed(tmp_path, data, step) for step in (len(data), 1_000_003, 70_001)]
    assert len({(one.digest, one.diff_id, one.size) for one in results}) == 1
    whole = results[0].path.read_bytes()
    assert gzip.decompress(whole) == data and model.digest_of(whole) == results[0].digest and model.digest_of(data) == results[0].diff_id
    assert len(whole) == results[0].size < 2_200_000 and whole[4:8] == bytes(4)
    subprocess.run(["gzip", "--test", "--stdout", results[0].path], check=True, stdin=subprocess.DEVNULL)
    assert gzip.decompress(packed(tmp_path, b"", 1).path.read_bytes()) == b""


# The door


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def test_what_add_refuses(home: Home, tmp_path: Path) -> None:
    image = imported(tmp_path, folder("etc") + END)
    images = Images(home)
    data = images.documents(image.digest).data
    good = json.loads(data)

    def refused(why: str, error: type[TrivisorError] = ImageError, name: str = "y", **changes: Any) -> None:
        with images.workspace() as work, pytest.raises(error, match=why):
            images.add(json.dumps({**good, **changes}).encode(), model.OCI_MANIFEST, name, "a test", work)

    refused("is not there", layers=[{**good["layers"][0], "digest": DIGEST}])
    refused("bytes, not", layers=[{**good["layers"][0], "size": 7}])
    refused("of 1 layers, its manifest of 2", layers=good["layers"] * 2)
    refused("malformed|over the limit", config={**good["layers"][0], "mediaType": model.OCI_CONFIG})
    refused("host", InvalidSpec, name="host")
    refused("name of an image", InvalidSpec, name="A")
    assert [one.name for one in images.list()] == ["x:latest"] and left(home) == []
    images.collect()
    assert len(list((images.store.root / "blobs/sha256").iterdir())) == 3
    with images.workspace() as work:
        nameless = images.add(data + b" ", model.OCI_MANIFEST, "", "a test", work)
        images.collect()
        assert images.documents(nameless.digest).config == image.config
    images.collect()
    with pytest.raises(NotFound):
        Images(home).documents(nameless.digest)


HOSTILE = {
    "dotdot": (file("../../x") + END, "'..'"),
    "through-a-link": (block("s", "2", target="/etc") + file("s/../../x") + END, "'..'"),
    "hard-link-out": (block("b", "1", target="/etc/shadow") + END, "does not have"),
    "device": (block("sda", "4", device=(8, 0)) + END, "device node"),
    "loop": (block("a", "2", target="b") + block("b", "2", target="a") + file("a/x") + END, "loop"),
    "file-as-parent": (file("etc/os-release/x") + END, "not a folder"),
    "truncated": (file("a", b"x" * 2000)[:1024], "truncated"),
    "no-end": (file("a"), "truncated"),
    "entries": (b"".join(file(f"f{number}") for number in range(300)) + END, "over 300 entries"),
    "total": (block("big", size=900 * MIB) + END, "larger than the limit"),
    "bomb": (file("a") + END + bytes(80 * MIB), "a bomb"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_layers_made_to_hurt(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Registered as a pull registers them, so that they are met only when they are unpacked."""
    data, why = HOSTILE[case]
    imported(tmp_path, folder("etc") + file("etc/os-release") + END)
    image = layered_image(home, "x", [file("fine") + END, data], "y")
    images = Images(home)
    small = Limits(total=800 * MIB, entries=300, ratio=100)
    monkeypatch.setattr(layers.unpack_layers, "__kwdefaults__", {"limits": small})
    with pytest.raises(ImageError, match=why):
        images.lowers(image.digest)
    assert left(home) == [] and not any(path.exists() for path in images.lower_paths(image.digest))
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "home"}


def test_an_image_of_another_processor_is_kept_and_not_run(home: Home, tmp_path: Path) -> None:
    imported(tmp_path, folder("etc") + END)
    images = Images(home)
    image = images.import_(tmp_path / "archive", "other", platform=Platform("arm64"))
    assert str(image.platform) == "linux/arm64"
    for root in (images.lowers, images.rootfs):
        with pytest.raises(ImageError, match="linux/arm64, not"):
            root(image.digest)
    assert (images.unpacked(image.digest)[0] / "etc").is_dir()
    with pytest.raises(ImageError, match="linux/arm64, not"):
        images.lowers(image.digest)  # it is there, but only to be looked into


def test_tags_and_names(home: Home, tmp_path: Path) -> None:
    image = imported(tmp_path, folder("etc") + END)
    images = Images(home)
    images.tag("docker.io/library/x:latest", "localhost:5000/team/y:1")
    assert [one.name for one in images.list()] == ["localhost:5000/team/y:1", "x:latest"]
    assert images.get("localhost:5000/team/y:1").digest == image.digest
    images.remove("x")
    assert images.store.exists(image.digest) and io.BytesIO(images.documents(image.digest).data)
