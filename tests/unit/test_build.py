"""Whole builds that need no machine: what COPY and ADD take from where, and what else goes on at the same time."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from registry_support import NOBODY, QUICK, Fake, digest_of

from trivisor import VMM
from trivisor.core.errors import InvalidSpec, RecipeError, StorageError
from trivisor.images import model
from trivisor.images.catalog import Image
from trivisor.images.model import Platform
from trivisor.images.registry.bounds import Bounds
from trivisor.images.view import StackView, everything
from trivisor.va.build.build import build
from trivisor.va.build.events import BuildEvent
from trivisor.va.build.options import Options

Build = Callable[..., Image]


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[VMM]:
    with VMM(tmp_path / "home", engines=[FakeEngine()]) as opened:
        yield opened


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def made(vmm: VMM, context: Path) -> Build:
    def from_text(text: str, tags: tuple[str, ...] = ("built",), **options: object) -> Image:
        (context / "Containerfile").write_text(text)
        return build(vmm, context, tags, options=Options(**options))  # type: ignore[arg-type]

    return from_text


def files(vmm: VMM, image: Image) -> dict[str, tuple[int, int, bytes]]:
    """Return mode, time and content of each file, by path."""
    view = StackView(vmm.images.unpacked(image.digest))
    top = view.at("")
    assert top is not None
    return {node.path: (node.mode, node.mtime // 10**9, node.open().read()) for node in everything(view, top) if node.kind == "f"}


def texts(vmm: VMM, image: Image) -> dict[str, bytes]:
    return {path: data for path, (_, _, data) in files(vmm, image).items()}


# ADD of addresses


@pytest.fixture
def site() -> Iterator[str]:
    """The address of a server that has "/file", "/packed.tar", "/moved" (to file), and a folder without a name."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("inside"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {
                "/file?v=1": b"fetched",
                "/file": b"fetched",
                "/packed.tar": packed.getvalue(),
                "/": b"top",
                "/large": bytes(6 << 20),
            }.get(self.path)
            self.send_response(302 if self.path == "/moved" else 404 if body is None else 200)
            if self.path == "/moved":
                self.send_header("Location", "/file")
            self.send_header("Last-Modified", "Thu, 01 Jan 1970 00:16:40 GMT")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_are_fetched(vmm: VMM, made: Build, site: str) -> None:
    """With the time that the server gives, for root alone to read, and archives as they are."""
    checksum = hashlib.sha256(b"fetched").hexdigest()
    add = f"ADD --checksum=sha256:{checksum} {site}/file?v=1 /d/"
    image = made(f"FROM scratch\n{add}\nADD {site}/packed.tar /d/\nADD --chmod=755 {site}/moved /x")
    found = files(vmm, image)
    assert found.keys() == {"d/file", "d/packed.tar", "x"}
    assert found["d/file"] == (0o600, 1000, b"fetched") and found["x"] == (0o755, 1000, b"fetched")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"ADD --checksum=sha256:{'0' * 64} SITE/file /x", "is sha256:"),
        ("ADD SITE/none /x", "404"),
        ("ADD SITE/ /d/", "no name for its file"),
    ],
)
def test_addresses_that_do_not_do(vmm: VMM, made: Build, site: str, line: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        made(f"FROM scratch\n{line.replace('SITE', site)}")
    assert caught.value.line == 2
    assert vmm.images.list() == [] and vmm.images.collect() == 0 and not vmm.images.store.sizes()


# What is left out of the context


def test_the_nearest_ignore_file_counts(vmm: VMM, made: Build, context: Path) -> None:
    text = "FROM scratch\nCOPY . /"
    (context / ".dockerignore").write_text("a\n.*\nContainerfile*\n")
    assert texts(vmm, made(text)).keys() == {"b", "c"}
    (context / ".containerignore").write_text("b\n.*\nContainerfile*\n")
    assert texts(vmm, made(text)).keys() == {"a", "c"}
    (context / "Containerfile.dockerignore").write_text("*\n!c\n")
    assert texts(vmm, made(text)).keys() == {"c"}


def test_an_ignore_file_that_cannot_be_read(made: Build, context: Path) -> None:
    (context / ".dockerignore").write_text("[a\n")
    with pytest.raises(InvalidSpec, match=r"\.dockerignore: .*closed"):
        made("FROM scratch\nCOPY . /")
    (context / ".dockerignore").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSpec, match=r"\.dockerignore cannot be read"):
        made("FROM scratch\nCOPY . /")


def test_a_file_that_may_not_be_read(made: Build, context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read every file, so the kernel's answer is made up."""
    really = os.open

    def denied(path: str | Path, *rest: Any, **more: Any) -> int:
        if str(path) == str(context / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(RecipeError, match=r"Containerfile:2: COPY: .*/b: Permission denied"):
        made("FROM scratch\nCOPY . /")
    with pytest.raises(RecipeError, match=r"Containerfile:2: ADD: b cannot be read: Permission denied") as caught:
        made("FROM scratch\nADD b /")
    assert "dockerignore" in caught.value.hint


def test_an_archive_that_is_hostile(made: Build, context: Path) -> None:
    with tarfile.open(context / "bad.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../../outside"))
    with pytest.raises(RecipeError, match=r"Containerfile:3: ADD: .*outside"):
        made("FROM scratch\n\nADD bad.tar /x/")


def test_where_the_containerfile_is(vmm: VMM, context: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"Containerfile or .*Dockerfile"):
        build(vmm, context)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY a /docker")
    assert texts(vmm, build(vmm, context, ["built"])).keys() == {"docker"}
    (context / "Containerfile").write_text("FROM scratch\nCOPY a /container")
    assert texts(vmm, build(vmm, context, ["built"])).keys() == {"container"}
    (tmp_path / "elsewhere").write_text("FROM scratch\nCOPY a /else")
    image = build(vmm, context, ["built", "also:2"], file=tmp_path / "elsewhere")
    assert texts(vmm, image).keys() == {"else"}
    assert [one.name for one in vmm.images.list()] == ["also:2", "built:latest"]
    (context / "Containerfile").write_bytes(b"FROM scratch\nCOPY \xff /")
    with pytest.raises(RecipeError, match=r"Containerfile:2: .*UTF-8"):
        build(vmm, context)


# Platforms


def test_platforms(vmm: VMM, made: Build) -> None:
    """What is built for another processor says so, and a base for this one does not do for it."""
    here = Platform.host()
    text = "FROM scratch AS base\nARG TARGETPLATFORM BUILDPLATFORM TARGETVARIANT\nCOPY a /a\nLABEL is=$TARGETPLATFORM on=$BUILDPLATFORM"
    there = made(text, platform=Platform.parse("linux/riscv64/v9"))
    assert str(there.platform) == "linux/riscv64/v9"
    assert there.config.labels == {"is": "linux/riscv64/v9", "on": str(here)}
    made(text, ("base",))
    assert made("FROM --platform=$BUILDPLATFORM base\nCOPY b /b").platform == here
    with pytest.raises(RecipeError, match=r":4: RUN: the image is for linux/riscv64") as caught:
        made("FROM scratch\nCOPY a /a\n\nRUN a", platform=Platform.parse("riscv64"))
    assert "BUILDPLATFORM" in caught.value.hint
    nobody = {"access": {"bounds": Bounds(tries=1, connect=1.0)}}
    vmm.images.tag("base", "127.0.0.1:1/base")
    with pytest.raises(RecipeError, match=f"is for {here}, not linux/s390x") as caught:
        made("FROM scratch\nFROM --platform=linux/s390x 127.0.0.1:1/base\nCOPY a /a", **nobody)
    assert caught.value.line == 2
    with pytest.raises(RecipeError, match="FROM --platform: 'a b' is not a platform"):
        made("FROM --platform='a b' base")


def test_a_base_of_another_platform_takes_no_name(vmm: VMM, made: Build) -> None:
    """It comes from the registry for the build alone: the name goes on meaning what runs here."""
    with Fake() as fake:
        index = []
        for architecture in (Platform.host().architecture, "s390x"):
            name = fake.image(layers=[], tag=architecture)
            data = fake.manifests[f"some/app/{architecture}"][0]
            config = json.dumps({"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
            data = json.dumps({**json.loads(data), "config": fake.blob(config, model.OCI_CONFIG)}).encode()
            fake.manifest("some/app", architecture, data)
            index.append({"mediaType": model.OCI_MANIFEST, "digest": digest_of(data), "size": len(data)})
            index[-1] |= {"platform": {"architecture": architecture, "os": "linux"}}  # type: ignore[dict-item]
        name = fake.manifest("some/app", "1", json.dumps({"schemaVersion": 2, "manifests": index}).encode(), model.OCI_INDEX)
        access = {"bounds": QUICK, "credentials": NOBODY}
        text = f"FROM {name} AS here\nFROM --platform=linux/s390x {name}\nCOPY --from=here / /\nCOPY a /a"
        assert made(text, access=access).platform == Platform("s390x")
        assert vmm.images.get("built").platform == Platform("s390x")
        assert made(f"FROM {name}\nCOPY a /a", ("own",), access=access).platform == Platform.host()
        assert vmm.images.get(name).platform == Platform.host()


# Beside other things


def test_prune_and_removal_beside_a_build(vmm: VMM, made: Build) -> None:
    """Between any two steps: what the build found and made stays for it."""
    made("FROM scratch\nCOPY a /a", ("base",))
    text = "FROM base AS one\nCOPY b /b\nFROM one\nCOPY c /c\nCOPY --from=one /b /again"
    first = made(text)
    vmm.images.remove("built")

    def prune(event: BuildEvent) -> None:
        if event.kind == "done":
            if any(image.name == "base:latest" for image in vmm.images.list()):
                vmm.images.remove("base")
            vmm.images.prune(everything=True)

    image = made(text, report=prune)
    assert vmm.images.check() == [] and texts(vmm, image).keys() == {"a", "b", "c", "again"}
    assert len(image.layers) == len(first.layers) == 4


@pytest.mark.parametrize("large", ["COPY b /d/", "ADD SITE/large /d/", "COPY <<E /d/\n" + "0123456789" * 90_000 + "\nE"])
def test_a_disk_that_fills(tmp_path: Path, context: Path, site: str, large: str) -> None:
    """Refused with a hint, nothing left of it, and what was there is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    try:
        with VMM(disk / "home", engines=[FakeEngine()]) as vmm:
            (context / "Containerfile").write_text("FROM scratch\nCOPY a b /d/")
            old = build(vmm, context, ["built"])
            used = sum(vmm.images.store.sizes().values())
            (context / "b").write_bytes(os.urandom(6 << 20))
            (context / "Containerfile").write_text(f"FROM scratch\n{large.replace('SITE', site)}")
            filler = disk / "filler"
            filler.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - (512 << 10)))
            with pytest.raises(StorageError, match="No space left") as caught:
                build(vmm, context, ["built"])
            assert "TRIVISOR_HOME" in caught.value.hint
            assert vmm.images.get("built") == old and vmm.images.check() == []
            vmm.images.collect()
            assert sum(vmm.images.store.sizes().values()) == used and not list((vmm.images.store.root / "tmp").glob("*-*"))
            filler.unlink()
            (context / "b").write_bytes(b"small")
            (context / "Containerfile").write_text("FROM scratch\nCOPY a b /d/")
            assert build(vmm, context, ["built"]).digest != old.digest
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
