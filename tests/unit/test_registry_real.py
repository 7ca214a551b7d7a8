"""A real registry, and a real other client: what skopeo pushes we pull, what we push skopeo reads and umoci unpacks."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from missing import lacks
from registry_server import Registry, needs, skopeo
from registry_support import NOBODY, QUICK, Puller, digest_of

from trivisor.core.errors import InvalidSpec, NotFound, RegistryError
from trivisor.core.paths import Home
from trivisor.images import model
from trivisor.images.catalog import Images
from trivisor.images.reference import Reference
from trivisor.images.registry.bounds import Bounds
from trivisor.images.registry.credentials import Credentials
from trivisor.images.registry.crew import Progress
from trivisor.images.registry.push import push

LOGIN = ("me", "se:cret")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


def layer(**files: bytes) -> bytes:
    """A layer with these files, as gzip."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def made(puller: Puller, *layers: bytes) -> str:
    """Make an image in the store; return its manifest's digest."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]},
        "config": {"Cmd": ["/bin/true"]},
    }
    blobs = [(json.dumps(config).encode(), model.OCI_CONFIG), *((gzip.compress(data, 1, mtime=0), model.OCI_LAYER_GZIP) for data in layers)]
    described = [{"mediaType": kind, "digest": digest_of(data), "size": len(data)} for data, kind in blobs]
    manifest = {"schemaVersion": 2, "mediaType": model.OCI_MANIFEST, "config": described[0], "layers": described[1:]}
    for data, _ in blobs:
        puller.store.add(io.BytesIO(data), "test")
    return puller.store.add(io.BytesIO(json.dumps(manifest).encode()), "test")


def send(puller: Puller, name: str, digest: str, **options: Any) -> list[Progress]:
    """Push, and return what was reported."""
    events: list[Progress] = []
    options = {"bounds": QUICK, "credentials": NOBODY, "report": events.append, **options}
    assert push(Reference.parse(name), puller.store, digest, **options) == digest
    return events


def test_skopeo_and_umoci_read_what_we_push(registry: Registry, puller: Puller, tmp_path: Path) -> None:
    digest = made(puller, layer(hello=b"one"), layer(big=os.urandom(300_000)))
    send(puller, f"{registry.host}/made/here:1", digest)
    seen = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{registry.host}/made/here:1"))
    assert seen["Digest"] == digest and len(seen["Layers"]) == 2
    skopeo("copy", "--src-tls-verify=false", f"docker://{registry.host}/made/here:1", f"oci:{tmp_path}/layout:1")
    needs("umoci")
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    argv = ["umoci", "unpack", *rootless, "--image", f"{tmp_path}/layout:1", tmp_path / "bundle"]
    subprocess.run(argv, check=True, capture_output=True)
    assert (tmp_path / "bundle/rootfs/hello").read_bytes() == b"one"


@pytest.mark.parametrize("kind", ["oci", "v2s2"])
def test_we_read_what_skopeo_pushes(registry: Registry, tmp_path: Path, kind: str) -> None:
    """There as OCI and as Docker's schema 2, and back from us to another registry's repository."""
    here, there = Puller(tmp_path / "here"), Puller(tmp_path / "there")
    send(here, f"{registry.host}/from/us:{kind}", made(here, layer(hello=kind.encode())))
    source, target = f"docker://{registry.host}/from/us:{kind}", f"docker://{registry.host}/from/{kind}:1"
    skopeo("copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--format", kind, source, target)
    pulled = there(f"{registry.host}/from/{kind}:1")
    assert pulled.media_type == (model.OCI_MANIFEST if kind == "oci" else model.DOCKER_MANIFEST)
    assert there.holds(gzip.compress(layer(hello=kind.encode()), 1, mtime=0))
    send(there, f"{registry.host}/back/{kind}:1", pulled.digest)
    assert json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{registry.host}/back/{kind}:1"))["Digest"] == pulled.digest


def test_what_is_there_is_not_sent_again(registry: Registry, puller: Puller) -> None:
    digest = made(puller, layer(twice=b"sent once"))
    assert {event.state for event in send(puller, f"{registry.host}/twice/a:1", digest)} == {"queued", "uploading", "done"}
    assert {event.state for event in send(puller, f"{registry.host}/twice/a:2", digest)} == {"queued", "exists"}


def test_blobs_are_mounted_from_a_neighbour(registry: Registry, puller: Puller) -> None:
    digest = made(puller, layer(mounted=b"from there"))
    send(puller, f"{registry.host}/mount/a:1", digest)
    events = send(puller, f"{registry.host}/mount/b:1", digest, mount_from=["no/such", "mount/a"])
    assert {event.state for event in events} == {"queued", "exists"}
    assert len(registry.requests("POST /v2/mount/b/blobs/uploads/?mount=")) == 4
    assert not registry.requests("PUT /v2/mount/b/blobs/")


def test_large_blob_goes_up_in_pieces(registry: Registry, puller: Puller) -> None:
    data = os.urandom(700_000)
    digest = made(puller, data)
    send(puller, f"{registry.host}/pieces/a:1", digest, bounds=Bounds(chunk=256 << 10))
    assert len(registry.requests("PATCH /v2/pieces/a/blobs/uploads/")) == 3
    assert puller(f"{registry.host}/pieces/a:1").digest == digest


def test_what_the_store_lacks_is_said_before_anything_is_sent(registry: Registry, puller: Puller) -> None:
    digest = made(puller, b"data")
    puller.store.path(digest_of(gzip.compress(b"data", 1, mtime=0))).unlink()
    with pytest.raises(NotFound):
        send(puller, f"{registry.host}/lacks/a:1", digest)
    with pytest.raises(InvalidSpec):
        send(puller, f"{registry.host}/lacks/a@sha256:{'a' * 64}", digest)
    assert not registry.requests("/v2/lacks/a")


@pytest.mark.parametrize("tokens", [False, True], ids=["basic", "bearer"])
def test_login(tmp_path: Path, tokens: bool) -> None:
    """From arguments and from the Docker config; without one, or with another, it is refused, and says so."""
    puller, other = Puller(tmp_path / "a"), Puller(tmp_path / "b")
    digest = made(puller, layer(file=b"private"))
    with Registry(tmp_path / "registry", login=LOGIN, tokens=tokens) as registry:
        name = f"{registry.host}/private/a:1"
        for wrong in (NOBODY, Credentials("me", "wrong")):
            with pytest.raises(RegistryError) as caught:
                send(puller, name, digest, credentials=wrong)
            assert caught.value.status in (401, 403) and "log" in caught.value.hint
            assert "wrong" not in str(caught.value)
        send(puller, name, digest, credentials=registry.credentials)
        send(puller, f"{registry.host}/private/b:1", digest, credentials=registry.credentials, mount_from=["private/a"])
        assert other(f"{registry.host}/private/b:1", credentials=registry.credentials).digest == digest
        if tokens:  # this token server lets anybody pull
            assert Puller(tmp_path / "c")(name).digest == digest


def test_tls_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name that is not loopback's: an unknown authority is refused, unless it is given or the registry may be insecure."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        lacks("needs this host to know its own name")
    with Registry(tmp_path / "registry", name=name) as registry:
        puller = Puller(tmp_path)
        with pytest.raises(RegistryError, match="certificate"):
            puller(f"{registry.host}/some/app:1")
        with pytest.raises(NotFound):
            puller(f"{registry.host}/some/app:1", insecure=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(registry.authority))
        digest = made(puller, b"data")
        send(puller, f"{registry.host}/some/app:1", digest)
        assert puller(f"{registry.host}/some/app:1").digest == digest


def test_catalog_pulls_and_pushes(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Docker config's credentials (none), and blobs mounted from where the image came from."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    other = Puller(tmp_path / "other")
    digest = made(other, layer(hello=b"catalog"))
    name = f"{registry.host}/catalog/a:1"
    send(other, name, digest)
    home = Home(tmp_path / "home")
    home.open()
    images = Images(home)
    image = images.pull(name)
    assert (image.name, image.digest, image.source) == (name, digest, f"docker://{name}")
    assert (images.lowers(digest)[0] / "hello").read_bytes() == b"catalog"
    assert images.push(name, f"{registry.host}/catalog/b:2") == digest
    assert registry.requests("POST /v2/catalog/b/blobs/uploads/?mount=") and not registry.requests("PUT /v2/catalog/b/blobs/")
    events: list[Progress] = []
    images.remove(name)
    assert images.pull(f"{registry.host}/catalog/b:2", report=events.append).digest == digest
    assert "done" in {event.state for event in events}, "what was removed was gone"
    images.close()


def test_registry_on_a_loopback_address_may_have_any_certificate(tmp_path: Path) -> None:
    with Registry(tmp_path / "registry", name="localhost") as registry, pytest.raises(NotFound):
        Puller(tmp_path)(f"{registry.host}/some/app:1")
