"""Images leave as OCI layouts and `docker save` archives and come back the same, here and in skopeo and umoci."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import tar_maker as tar
from images_for_tests import layered_image
from registry_server import needs, skopeo

from trivisor.core.errors import AlreadyExists, CallerError, ImageError, NotFound, StorageError
from trivisor.core.paths import Home
from trivisor.images import model
from trivisor.images.catalog import Images
from trivisor.images.reference import REGISTRY
from trivisor.images.registry.crew import Progress


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    """With "one:1" of one layer, and "two:latest" of that and another."""
    made = home(tmp_path / "home")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/hello").write_text("one")
    made.import_(tmp_path / "root", "one:1")
    layered_image(Home(tmp_path / "home"), "one:1", [tar.file("more", b"two") + tar.END], "two", cmd=["/more"], env=["A=b"])
    yield made
    made.close()


def home(folder: Path) -> Images:
    place = Home(folder)
    place.open()
    return Images(place)


def left(folder: Path) -> list[str]:
    """What half-made things lie in the folder."""
    return [str(path) for path in folder.rglob(".*") if path.name.endswith(".partial")]


@pytest.mark.parametrize("target", ["layout", "layout.tar"])
def test_export_is_read_by_us_with_the_same_digest(images: Images, tmp_path: Path, target: str) -> None:
    events: list[Progress] = []
    digest = images.export("two", tmp_path / target, report=events.append)
    assert digest == images.get("two").digest
    assert {event.state for event in events} == {"queued", "writing", "done"}
    other = home(tmp_path / "other")
    assert [(image.name, image.digest) for image in other.load(tmp_path / target)] == [("two:latest", digest)]
    assert other.import_(tmp_path / target, "renamed").digest == digest
    assert (other.lowers(digest)[0] / "more").read_bytes() == b"two"
    assert not left(tmp_path)
    other.close()


def test_the_same_image_makes_the_same_archive(images: Images) -> None:
    first, second = io.BytesIO(), io.BytesIO()
    images.save(["one:1", "two"], first)
    images.save(["one:1", "two"], second)
    assert first.getvalue() == second.getvalue()


def test_skopeo_and_umoci_read_what_we_export(images: Images, tmp_path: Path) -> None:
    digest = images.export("two", tmp_path / "layout")
    images.export("one:1", tmp_path / "layout")
    seen = json.loads(skopeo("inspect", f"oci:{tmp_path}/layout:latest"))
    assert seen["Digest"] == digest and seen["Env"] == ["A=b"]
    images.export("two", tmp_path / "layout.tar", tag="v2")
    assert json.loads(skopeo("inspect", f"oci-archive:{tmp_path}/layout.tar:v2"))["Digest"] == digest
    needs("umoci")
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    for name in ("latest", "1"):
        argv = ["umoci", "unpack", *rootless, "--image", f"{tmp_path}/layout:{name}", tmp_path / name]
        subprocess.run(argv, check=True, capture_output=True)
    assert (tmp_path / "latest/rootfs/more").read_bytes() == b"two"
    assert (tmp_path / "1/rootfs/hello").exists() and not (tmp_path / "1/rootfs/more").exists()


def test_skopeo_reads_what_we_save(images: Images, tmp_path: Path) -> None:
    images.save(["one:1", "two"], tmp_path / "saved.tar")
    for name, count in (("one:1", 1), ("two:latest", 2)):
        seen = json.loads(skopeo("inspect", f"docker-archive:{tmp_path}/saved.tar:{REGISTRY}/library/{name}"))
        assert len(seen["Layers"]) == count
    skopeo("copy", f"docker-archive:{tmp_path}/saved.tar:two:latest", f"oci:{tmp_path}/copied:1")
    other = home(tmp_path / "other")
    (image,) = other.load(tmp_path / "copied")
    assert image.name == "copied:1" and image.config.rootfs == images.get("two").config.rootfs
    other.close()


def test_docker_manifests_become_those_of_oci(images: Images, tmp_path: Path) -> None:
    two = images.documents(images.get("two").digest)
    layers = [msgspec.structs.replace(layer, media_type=model.DOCKER_LAYER_GZIP) for layer in two.manifest.layers]
    config = msgspec.structs.replace(two.manifest.config, media_type=model.DOCKER_CONFIG)
    manifest = model.Manifest(config, layers, 2, model.DOCKER_MANIFEST)
    with images.workspace() as work:
        docker = images.add(model.encode(manifest), model.DOCKER_MANIFEST, "docker", "test", work)
    assert images.export("docker", tmp_path / "as-is") == docker.digest
    digest = images.export("docker", tmp_path / "layout", oci=True)
    assert digest != docker.digest
    written = json.loads((tmp_path / "layout/blobs" / digest.replace(":", "/")).read_bytes())
    assert written["mediaType"] == model.OCI_MANIFEST and written["config"]["mediaType"] == model.OCI_CONFIG
    assert {layer["mediaType"] for layer in written["layers"]} == {model.OCI_LAYER_GZIP}
    assert images.export("two", tmp_path / "same", oci=True) == two.digest  # which is OCI already
    other = home(tmp_path / "other")
    assert [image.digest for image in other.load(tmp_path / "layout")] == [digest]
    other.close()


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive", "oci"])
def test_we_load_what_skopeo_saves(images: Images, tmp_path: Path, kind: str) -> None:
    digest = images.export("two", tmp_path / "layout")
    where = tmp_path / ("there" if kind == "oci" else "there.tar")
    skopeo("copy", f"oci:{tmp_path}/layout:latest", f"{kind}:{where}:registry.example/team/app:3")
    other = home(tmp_path / "other")
    (image,) = other.load(where)
    assert image.name == "registry.example/team/app:3"
    assert kind == "docker-archive" or image.digest == digest
    assert (other.lowers(image.digest)[0] / "more").read_bytes() == b"two"
    other.close()


def test_load_takes_all_images_with_all_their_names(images: Images, tmp_path: Path) -> None:
    images.tag("two", "example.org:5000/team/two:x")
    images.save(["one:1", "two", "example.org:5000/team/two:x"], tmp_path / "saved.tar")
    other = home(tmp_path / "other")
    loaded = other.load(tmp_path / "saved.tar")
    assert {image.name: image.digest for image in loaded} == {
        name: images.get(name).digest for name in ("one:1", "two:latest", "example.org:5000/team/two:x")
    }
    assert len(other.store.sizes()) == 6, "two manifests, two configs, two layers"
    other.close()


def test_what_load_cannot_name_it_does_not_take(images: Images, tmp_path: Path) -> None:
    images.save([images.get("two").digest], tmp_path / "named.tar")
    assert [image.name for image in images.load(tmp_path / "named.tar")] == ["two:latest"]
    images.export("two", tmp_path / "Not A Name")
    index = tmp_path / "Not A Name/index.json"
    for notes, hint in (({}, "import"), ({"org.opencontainers.image.ref.name": "1"}, "--base")):
        document = json.loads(index.read_bytes())
        document["manifests"][0]["annotations"] = notes
        index.write_text(json.dumps(document))
        with pytest.raises(ImageError) as caught:
            images.load(tmp_path / "Not A Name")
        assert hint in caught.value.hint
    assert [image.name for image in images.load(tmp_path / "Not A Name", base="mine")] == ["mine:1"]
    with pytest.raises(ImageError, match="no archive of images"):
        images.load(tmp_path / "root")


def test_export_joins_a_layout_and_replaces_its_own(images: Images, tmp_path: Path) -> None:
    target = tmp_path / "layout"
    images.export("two", target)
    images.export("two", target)
    images.tag("one:1", "other:latest")
    with pytest.raises(AlreadyExists, match="library/two:latest"):
        images.export("other", target)
    images.export("other", target, tag="mine")
    entries = json.loads((target / "index.json").read_bytes())["manifests"]
    assert [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in entries] == ["latest", "mine"]
    assert not left(tmp_path)


def test_export_is_refused_where_something_else_is(images: Images, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(AlreadyExists):
            images.export("two", tmp_path / name)
    with pytest.raises(AlreadyExists):
        images.save(["two"], tmp_path / "full")
    with pytest.raises(StorageError):
        images.export("two", tmp_path / "no/such/folder")
    with pytest.raises(NotFound):
        images.save(["two", "none"], tmp_path / "saved.tar")
    assert not (tmp_path / "saved.tar").exists()
    (tmp_path / "empty").mkdir()
    images.export("two", tmp_path / "empty")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "index.json").write_text("[]")
    with pytest.raises(ImageError, match="malformed"):
        images.export("two", damaged)


@pytest.mark.parametrize("target", ["layout", "saved.tar"])
def test_interrupted_export_leaves_what_was_there(images: Images, tmp_path: Path, target: str) -> None:
    images.export("one:1", tmp_path / target)
    before = sorted((path, path.read_bytes()) for path in [tmp_path / target, *(tmp_path / target).rglob("*")] if path.is_file())

    def interrupt(event: Progress) -> None:
        if event.state == "done":
            raise KeyboardInterrupt

    for where in (target, "new" + target[6:]):
        with pytest.raises(KeyboardInterrupt):
            images.export("two", tmp_path / where, report=interrupt)
    assert not left(tmp_path) and not (tmp_path / ("new" + target[6:])).exists()
    for path, data in before:
        assert path.read_bytes() == data


def test_a_full_disk_is_a_storage_error(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for target in ("layout", "saved.tar"):
        with pytest.raises(StorageError, match="No space"):
            images.export("two", tmp_path / target)
        assert not (tmp_path / target).exists()
    assert not left(tmp_path)


def test_damaged_blob_does_not_leave(images: Images, tmp_path: Path) -> None:
    layer = images.store.path(images.get("two").layers[1].digest)
    layer.chmod(0o644)
    data = bytearray(layer.read_bytes())
    data[-1] ^= 1
    layer.write_bytes(data)
    for target in ("layout", "layout.tar"):
        with pytest.raises(StorageError, match="is damaged"):
            images.export("two", tmp_path / target)
        assert not (tmp_path / target).exists()


def test_two_exports_into_one_layout(images: Images, tmp_path: Path) -> None:
    """While one writes, the other is refused, and says why."""
    images.export("one:1", tmp_path / "layout")
    said: list[str] = []

    def meanwhile(event: Progress) -> None:
        if not said:
            with pytest.raises(CallerError) as caught:
                images.export("one:1", tmp_path / "layout")
            said.append(str(caught.value))

    images.export("two", tmp_path / "layout", report=meanwhile)
    assert "another process" in said[0]


def test_image_that_is_removed_while_it_leaves(images: Images, tmp_path: Path) -> None:
    def remove(event: Progress) -> None:
        if event.state == "queued":
            for image in images.list():
                images.remove(image.name)
            images.prune(everything=True)

    digest = images.export("two", tmp_path / "two.tar", report=remove)
    assert images.list() == []
    assert images.load(tmp_path / "two.tar")[0].digest == digest


def test_archive_has_what_docker_reads(images: Images, tmp_path: Path) -> None:
    """By the names and fields that Docker's image specification (v1.2) gives."""
    images.save(["two"], tmp_path / "saved.tar")
    with tarfile.open(tmp_path / "saved.tar") as archive:
        (saved,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert saved["RepoTags"] == ["two:latest"]
        config = json.load(archive.extractfile(saved["Config"]))  # type: ignore[arg-type]
        assert len(saved["Layers"]) == len(config["rootfs"]["diff_ids"]) == 2
        assert {archive.getmember(name).isreg() for name in saved["Layers"]} == {True}
