"""Pushing to registries that are slow, forget, break off and lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from registry_support import NOBODY, QUICK, Fake, Puller, Request, digest_of

from trivisor.core.errors import RegistryError
from trivisor.images.reference import Reference
from trivisor.images.registry.credentials import Credentials
from trivisor.images.registry.push import push

LAYER = bytes(range(256)) * 1024
DIGEST = digest_of(LAYER)


class Taker:
    """Makes `fake` take uploads: `got` are the bytes of each upload, `status` what each piece is answered with before 202."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.got: dict[str, bytes] = {}
        self.fail: list[int | None] = []
        self.there = ""
        self.digest = ""
        fake.hook = self.hook

    def hook(self, request: Request) -> bool:
        path, _, query = request.path.partition("?")
        upload = re.fullmatch(r"/v2/to/here/blobs/uploads/(\d*)", path)
        if request.command == "PUT" and "/manifests/" in path:
            data = request.rfile.read(int(request.headers["Content-Length"]))
            self.fake.manifest("to/here", path.rpartition("/")[2], data, request.headers["Content-Type"])
            request.answer(201, Docker_Content_Digest=self.digest or digest_of(data))
        elif upload and request.command == "POST":
            name = str(len(self.got))
            self.got[name] = b""
            request.answer(202, Location=f"{self.there}{path}{name}")
        elif upload and request.command == "GET":
            request.answer(204, Location=path, Range=f"0-{max(len(self.got[upload[1]]) - 1, 0)}")
        elif upload:
            self.piece(request, upload[1], query)
        else:
            return False
        return True

    def piece(self, request: Request, name: str, query: str) -> None:
        size = int(request.headers["Content-Length"])
        status = self.fail.pop(0) if self.fail else None
        if status == 0:  # takes half of it, and breaks off
            self.got[name] += request.rfile.read(size // 2)
            request.close_connection = True
            return
        data = request.rfile.read(size)
        if status:
            request.answer(status)
            return
        self.got[name] += data
        if request.command == "PUT":
            assert query == f"digest={digest_of(self.got[name]).replace(':', '%3A')}"
            self.fake.blobs[digest_of(self.got[name])] = self.got[name]
        request.answer(201 if request.command == "PUT" else 202, Location=request.path.partition("?")[0])


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as registry:
        yield registry


@pytest.fixture
def puller(fake: Fake, tmp_path: Path) -> Puller:
    """One that has pulled an image of one layer; the registry has it no more."""
    puller = Puller(tmp_path)
    puller(fake.image(layers=[LAYER]))
    fake.blobs.clear()
    fake.seen.clear()
    return puller


def send(fake: Fake, puller: Puller, name: str = "to/here:1", **options: Any) -> None:
    digest = digest_of(fake.manifests["some/app/1"][0])
    options = {"bounds": QUICK, "credentials": NOBODY, **options}
    push(Reference.parse(f"{fake.host}/{name}"), puller.store, digest, **options)


def test_push_is_whole(fake: Fake, puller: Puller) -> None:
    Taker(fake)
    send(fake, puller)
    assert fake.blobs[DIGEST] == LAYER and fake.manifests["to/here/1"] == fake.manifests["some/app/1"]
    assert fake.seen[-1][0] == "PUT" and "/manifests/" in fake.seen[-1][1], "the manifest is last"


def test_broken_piece_is_gone_on_with(fake: Fake, puller: Puller) -> None:
    taker = Taker(fake)
    send_size = len(LAYER)
    taker.fail = [None, 0]
    fake.blobs = {digest: data for digest, data in fake.blobs.items() if digest != DIGEST}
    send(fake, puller, bounds=replace(QUICK, chunk=send_size // 4, parallel=1))
    assert fake.blobs[DIGEST] == LAYER
    assert len(fake.paths("GET", "/uploads/")) == 1, "the registry was asked how far it is"
    starts = [headers["Content-Range"] for how, _, headers in fake.seen if how == "PATCH"]
    assert starts[2].startswith(f"{send_size // 4 + send_size // 8}-")


@pytest.mark.parametrize("status", [500, 503, 429, 404])
def test_upload_that_failed_begins_again(fake: Fake, puller: Puller, status: int) -> None:
    taker = Taker(fake)
    taker.fail = [status]
    send(fake, puller, bounds=replace(QUICK, parallel=1))
    assert fake.blobs[DIGEST] == LAYER


@pytest.mark.parametrize("status", [400, 403, 413])
def test_upload_that_is_refused_is_said(fake: Fake, puller: Puller, status: int) -> None:
    taker = Taker(fake)
    taker.fail = [status] * 9
    with pytest.raises(RegistryError) as caught:
        send(fake, puller, bounds=replace(QUICK, parallel=1))
    assert caught.value.status == status and "to/here/1" not in fake.manifests


def test_upload_elsewhere_goes_without_credentials(fake: Fake, puller: Puller) -> None:
    with Fake() as other:
        taker, elsewhere = Taker(fake), Taker(other)
        taker.there = other.url
        elsewhere.got = taker.got
        old = fake.hook

        def hook(request: Request) -> bool | None:
            if request.path != "/v2/" and not request.headers.get("Authorization"):
                request.answer(401, WWW_Authenticate='Basic realm="here"')
                request.close_connection = True
                return True
            return old(request) if old else None

        fake.hook = hook
        send(fake, puller, credentials=Credentials("me", "secret"))
        assert other.blobs[DIGEST] == LAYER
        assert other.seen and not any("Authorization" in headers for _, _, headers in other.seen)


@pytest.mark.parametrize("there", ["ftp://127.0.0.1", "http://me:pw@127.0.0.1:1", "http://[::"])
def test_upload_to_nowhere_is_refused(fake: Fake, puller: Puller, there: str) -> None:
    Taker(fake).there = there
    with pytest.raises(RegistryError, match="takes uploads at"):
        send(fake, puller)


def test_registry_that_changes_the_manifest_is_said(fake: Fake, puller: Puller) -> None:
    Taker(fake).digest = digest_of(b"another")
    with pytest.raises(RegistryError, match="made 'sha256:"):
        send(fake, puller)
