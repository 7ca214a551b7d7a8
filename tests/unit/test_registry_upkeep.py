"""Clearing away beside a pull that is under way: what it has, and what it is in the middle of, stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_support import DIGEST, LAYER, NOBODY, QUICK, Fake, Request, digest_of

from trivisor.core.paths import Home
from trivisor.images.catalog import Images
from trivisor.images.registry import partial

FIRST = b"the layer that comes at once"


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as registry:
        yield registry


def test_prune_and_collection_beside_a_pull(fake: Fake, tmp_path: Path) -> None:
    """One layer is in the store, one half fetched and one not begun; others prune all, collect, and remove an image that shares a layer."""
    half, go = threading.Event(), threading.Event()

    def hook(request: Request) -> bool:
        if DIGEST not in request.path:
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(len(LAYER)))
        request.end_headers()
        request.wfile.write(LAYER[:400_000])
        request.wfile.flush()
        half.set()
        go.wait(20)
        request.wfile.write(LAYER[400_000:])
        return True

    home = Home(tmp_path / "home")
    home.open()
    images, other = Images(home), Images(home)
    images.pull(fake.image("some/other", [FIRST]), bounds=QUICK, credentials=NOBODY, insecure=True)
    fake.hook = hook
    name = fake.image(layers=[FIRST, LAYER])
    pulling = threading.Thread(target=lambda: images.pull(name, bounds=QUICK, credentials=NOBODY, insecure=True))
    pulling.start()
    try:
        assert half.wait(20)
        piece = partial.piece(other.store, DIGEST)
        while not piece.exists() or not piece.stat().st_size:
            assert pulling.is_alive()
        other.remove(f"{fake.host}/some/other:1")
        assert other.prune(everything=True).images == []
        other.collect()
        assert piece.exists() and other.store.exists(digest_of(FIRST)), "the pull needs it still"
        usage = other.usage()
        assert usage.rest.size > 0 and usage.rest.reclaimable == 0
    finally:
        go.set()
        pulling.join(20)
    assert images.get(name).size == len(FIRST) + len(LAYER) and images.check() == []
    images.remove(name)
    assert images.usage().size == 0
    images.close()
    other.close()
