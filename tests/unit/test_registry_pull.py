"""Pulling: what is right is stored, whatever is not as it should be is refused and nothing of it is left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_support import Fake, Puller, Request, digest_of

from trivisor.core.errors import HostError, ImageError, NotFound, RegistryError, StorageError
from trivisor.images import model
from trivisor.images.model import Platform
from trivisor.images.registry import partial


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as registry:
        yield registry


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


def when(part: str, then: Callable[[Request], object]) -> Callable[[Request], bool]:
    """A hook for the requests whose path has `part`."""

    def hook(request: Request) -> bool:
        if part in request.path:
            then(request)
            return True
        return False

    return hook


def layer(kind: str = model.OCI_LAYER, digest: str = "sha256:" + "a" * 64, size: int = 1) -> dict[str, Any]:
    """A descriptor of what is not there."""
    return {"mediaType": kind, "digest": digest, "size": size}


def test_image_is_stored_whole(fake: Fake, puller: Puller) -> None:
    pulled = puller(fake.image(layers=[b"one", b"two" * 100_000]))
    assert puller.holds(pulled.manifest) and puller.holds(b"one") and puller.holds(b"two" * 100_000)
    assert pulled.media_type == model.OCI_MANIFEST and pulled.digest == digest_of(pulled.manifest)
    assert puller.states(digest_of(b"one")) == ["queued", "downloading", "done"]
    assert puller.events[-1].done == puller.events[-1].total
    assert puller.pieces() == {}


def test_image_stays_while_it_is_pinned_and_goes_whole(fake: Fake, puller: Puller) -> None:
    puller(fake.image())
    puller.store.collect()
    assert puller.holds(b"layer one")
    puller.store.unpin("test")
    puller.store.collect()
    assert puller.empty()


def test_shared_layers_are_fetched_once(fake: Fake, puller: Puller) -> None:
    puller(fake.image(layers=[b"base", b"base", b"app"]))
    fake.seen.clear()
    puller(fake.image("other/app", [b"base", b"more"]))
    assert {path.rpartition("/")[2] for path in fake.paths()} & {digest_of(b"base"), digest_of(b"app")} == set()
    assert puller.states(digest_of(b"base"))[-1] == "exists"
    assert fake.paths()[0].startswith("/v2/other/app/blobs/")


def test_nothing_is_fetched_twice_for_a_layer_named_twice(fake: Fake, puller: Puller) -> None:
    puller(fake.image(layers=[b"base", b"base"]))
    assert len([path for path in fake.paths() if digest_of(b"base") in path]) == 1


def test_digest_is_what_it_was_asked_by(fake: Fake, puller: Puller) -> None:
    name = fake.image()
    digest = digest_of(fake.manifests["some/app/1"][0])
    assert puller(f"{name}@{digest}").digest == digest


def test_platform_is_chosen_from_an_index(fake: Fake, puller: Puller) -> None:
    listed = []
    for machine in ("amd64", "arm64"):
        fake.image(layers=[machine.encode()], tag=machine)
        data = fake.manifests[f"some/app/{machine}"][0]
        platform = {"architecture": machine, "os": "linux"}
        listed.append({"mediaType": model.OCI_MANIFEST, "digest": digest_of(data), "size": len(data), "platform": platform})
    index = json.dumps({"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": listed}).encode()
    name = fake.manifest("some/app", "all", index, model.OCI_INDEX)
    pulled = puller(name, platform=Platform.parse("arm64"))
    assert pulled.digest == listed[1]["digest"] and pulled.index == digest_of(index)
    assert puller.holds(b"arm64") and not puller.holds(b"amd64")
    with pytest.raises(ImageError, match="no image for linux/s390x") as caught:
        puller(name, platform=Platform.parse("linux/s390x"))
    assert "amd64" in caught.value.hint


def test_docker_schema_2_is_read(fake: Fake, puller: Puller) -> None:
    fake.image()
    text = fake.manifests["some/app/1"][0].decode().replace(model.OCI_LAYER_GZIP, model.DOCKER_LAYER_GZIP)
    text = text.replace(model.OCI_MANIFEST, model.DOCKER_MANIFEST).replace(model.OCI_CONFIG, model.DOCKER_CONFIG)
    assert puller(fake.manifest("some/app", "docker", text.encode(), model.DOCKER_MANIFEST)).media_type == model.DOCKER_MANIFEST


# What is refused


def test_wrong_digest_is_refused_and_not_kept(fake: Fake, puller: Puller) -> None:
    name = fake.image(layers=[b"good layer"])
    fake.blobs[digest_of(b"good layer")] = b"evil layer"
    with pytest.raises(ImageError, match=f"gave {digest_of(b'evil layer')}"):
        puller(name)
    assert not puller.holds(b"evil layer") and digest_of(b"good layer") not in puller.pieces()


@pytest.mark.parametrize("served", [b"shorter", b"longer than it"], ids=["short", "long"])
def test_wrong_size_is_refused_before_it_is_read(fake: Fake, puller: Puller, served: bytes) -> None:
    name = fake.image(layers=[b"eleven byte"])
    fake.blobs[digest_of(b"eleven byte")] = served
    with pytest.raises(ImageError, match=f"has {len(served)} bytes or more where its manifest says 11"):
        puller(name)


def test_blob_that_never_ends_is_cut_at_its_size(fake: Fake, puller: Puller) -> None:
    """Without a Content-Length nothing but our own count ends it."""
    sent = []

    def endless(request: Request) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        request.close_connection = True
        while len(sent) < 1000:
            request.wfile.write(b"x" * 65536)
            sent.append(1)

    name = fake.image(layers=[b"small" * 1000])
    fake.hook = when(f"/blobs/{digest_of(b'small' * 1000)}", endless)
    with pytest.raises(ImageError, match="where its manifest says 5000"):
        puller(name)
    assert len(sent) < 1000 and puller.pieces().get(digest_of(b"small" * 1000)) is None


def test_blob_in_chunks_is_taken(fake: Fake, puller: Puller) -> None:
    """Transfer-Encoding: chunked tells no length."""

    def chunked(request: Request) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for start in range(0, len(data), 50_000):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(data[start : start + 50_000]), data[start : start + 50_000]))
        request.wfile.write(b"0\r\n\r\n")

    data = os.urandom(160_000)
    name = fake.image(layers=[data])
    fake.hook = when(f"/blobs/{digest_of(data)}", chunked)
    puller(name)
    assert puller.holds(data)


def test_manifest_of_a_gigabyte_is_refused_unread(fake: Fake, puller: Puller) -> None:
    fake.hook = when("/manifests/", lambda request: request.answer(200, b"{" * 100, length=1 << 30))
    with pytest.raises(RegistryError, match="larger than"):
        puller(fake.image())


def test_manifest_without_a_length_is_cut(fake: Fake, puller: Puller) -> None:
    def endless(request: Request) -> None:
        request.send_response(200)
        request.end_headers()
        request.close_connection = True
        for _ in range(200):
            request.wfile.write(b" " * 65536)

    fake.hook = when("/manifests/", endless)
    with pytest.raises(RegistryError, match="larger than"):
        puller(fake.image())


def test_manifest_of_another_digest_is_refused(fake: Fake, puller: Puller) -> None:
    name, other = fake.image(), digest_of(b"other")
    fake.manifests[f"some/app/{other}"] = fake.manifests["some/app/1"]
    with pytest.raises(ImageError, match=f"for '{other}'"):
        puller(f"{name}@{other}")
    data, kind = fake.manifests["some/app/1"]
    fake.hook = when("/manifests/", lambda request: request.answer(200, data, Content_Type=kind, Docker_Content_Digest=other))
    with pytest.raises(ImageError, match=f"for '{other}'"):
        puller(name)
    assert puller.empty()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifests": []}, "two things"),
        ({"mediaType": model.DOCKER_MANIFEST}, "two things"),
        ({"layers": [layer(kind="application/vnd.oci.image.layer.nondistributable.v1.tar")]}, "foreign"),
        ({"layers": [layer(digest="sha256:../../../../etc")]}, "not a digest"),
        ({"layers": [layer(size=-1)]}, "-1 bytes"),
        ({"layers": [layer(size=30 << 30)]}, "too large"),
        ({"layers": [layer(digest="sha256:" + c * 64, size=15 << 30) for c in "abc"]}, "over the limit"),
        ({"layers": [layer(size=1), layer(size=2)]}, "two sizes"),
        ({"layers": "many"}, "malformed"),
        ({"config": layer(kind="application/vnd.cncf.helm.config.v1+json")}, "not an image"),
    ],
)
def test_manifest_that_no_image_has_is_refused(fake: Fake, puller: Puller, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        puller(fake.image(changes=changes))
    assert fake.paths() == []


@pytest.mark.parametrize("data", [b"", b"[]", b"<html>hello</html>", b'{"a": ' * 100_000, b"\xff\xfe", b"null"])
def test_page_that_is_no_manifest_is_refused(fake: Fake, puller: Puller, data: bytes) -> None:
    with pytest.raises(ImageError):
        puller(fake.manifest("some/app", "1", data, "text/html"))


def test_schema_1_is_refused_by_name(fake: Fake, puller: Puller) -> None:
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    with pytest.raises(ImageError, match="schema 1"):
        puller(fake.manifest("some/app", "1", b'{"schemaVersion": 1, "fsLayers": []}', kind))


def test_index_of_itself_ends(fake: Fake, puller: Puller) -> None:
    inner, kind = b"", model.OCI_INDEX
    for _ in range(4):
        listed = [{"mediaType": kind, "digest": digest_of(inner), "size": len(inner)}]
        inner = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": listed}).encode()
        name = fake.manifest("some/app", "1", inner, kind)
    with pytest.raises(ImageError, match="index of indexes"):
        puller(name)


def test_nothing_that_a_registry_says_moves_our_cursor(fake: Fake, puller: Puller) -> None:
    evil = "\x1b[2J"
    name = fake.image()
    data, kind = fake.manifests["some/app/1"]
    for hook in (
        lambda request: request.answer(200, data, Content_Type=kind, Docker_Content_Digest=f"sha256:{evil}"),
        lambda request: request.answer(200, b"{}", Content_Type=evil),
        lambda request: request.answer(302, Location=f"ftp://{evil}"),
        lambda request: request.wfile.write(f"HTTP/{evil}\r\n\r\n".encode()),
        lambda request: request.answer(401, WWW_Authenticate=f'Bearer realm="ftp://{evil}"'),
    ):
        fake.hook = when("/manifests/", hook)
        with pytest.raises(HostError) as caught:
            puller(name)
        assert "\x1b" not in f"{caught.value}{caught.value.hint}"


def test_what_is_not_there_is_not_found(fake: Fake, puller: Puller) -> None:
    with pytest.raises(NotFound, match="has no some/app:1") as caught:
        puller(f"{fake.host}/some/app:1")
    assert "\x1b" not in str(caught.value), "a registry may not move our cursor"
    assert len(fake.paths(part="/manifests/")) == 1, "asked once: it will not come by itself"


def test_layer_that_is_not_there_is_not_found(fake: Fake, puller: Puller) -> None:
    name = fake.image(layers=[b"lost"])
    del fake.blobs[digest_of(b"lost")]
    with pytest.raises(NotFound, match=digest_of(b"lost")):
        puller(name)


# The disk


def test_image_larger_than_the_disk_is_refused_before_it_is_fetched(fake: Fake, puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = os.statvfs_result((4096, 4096, 100, 2, 2, 100, 100, 100, 0, 255))
    monkeypatch.setattr(partial.os, "statvfs", lambda _: facts)
    with pytest.raises(StorageError, match="needs 10") as caught:
        puller(fake.image(layers=[b"x" * 100_000]))
    assert fake.paths() == [] and caught.value.hint


def test_pieces_of_long_ago_go(puller: Puller) -> None:
    puller.store.open()
    for name, age in (("a" * 64, 8 * 86400), ("b" * 64, 86400)):
        with partial.claim(puller.store, f"sha256:{name}") as piece:
            assert piece is not None
            piece.write(b"1234")
        stat = piece.path.stat()
        os.utime(piece.path, (stat.st_atime, stat.st_mtime - age))
    assert partial.tidy(puller.store) == 4
    assert puller.pieces() == {"sha256:" + "b" * 64: 4}
