"""A network and a registry that fail: tried again where that helps, given up where it does not, never waited for without end."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from registry_support import DIGEST, HASTY, LAYER, QUICK, Fake, Puller, Request, ranges

from trivisor.core.errors import RegistryError
from trivisor.images.registry.client import Client
from trivisor.images.registry.credentials import Credentials


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as registry:
        yield registry


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


def cut(request: Request, after: int, start: int = 0) -> None:
    """Send the layer from `start`, and break off."""
    request.send_response(206 if start else 200)
    request.send_header("Content-Length", str(len(LAYER) - start))
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(LAYER) - 1}/{len(LAYER)}")
    request.end_headers()
    request.wfile.write(LAYER[start : start + after])
    request.wfile.flush()
    request.close_connection = True


def begin(request: Request) -> int:
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    return int(match[1]) if match else 0


# Broken bodies


def test_body_that_breaks_off_is_gone_on_with(fake: Fake, puller: Puller) -> None:
    """Ten times a tenth: more breaks than tries, but each brought something."""

    def hook(request: Request) -> bool:
        if DIGEST not in request.path:
            return False
        cut(request, 110_000, begin(request))
        return True

    fake.hook = hook
    puller(fake.image(layers=[LAYER]))
    assert puller.holds(LAYER)
    assert ranges(fake)[:3] == ["", "bytes=110000-", "bytes=220000-"]


def test_body_that_always_breaks_off_at_once_is_given_up(fake: Fake, puller: Puller) -> None:
    fake.hook = lambda request: DIGEST in request.path and (cut(request, 10, begin(request)) or True)
    with pytest.raises(RegistryError) as caught:
        puller(fake.image(layers=[LAYER]))
    assert len(ranges(fake)) == QUICK.tries and caught.value.transient and caught.value.hint
    assert puller.pieces()[DIGEST] == 10 * QUICK.tries, "what came is kept"


def test_registry_without_ranges_gives_the_whole_again(fake: Fake, puller: Puller) -> None:
    def hook(request: Request) -> bool:
        if DIGEST not in request.path:
            return False
        if len(ranges(fake)) == 1:
            cut(request, 500_000)
        else:
            request.answer(200, LAYER)
        return True

    fake.hook = hook
    puller(fake.image(layers=[LAYER]))
    assert puller.holds(LAYER) and ranges(fake) == ["", "bytes=500000-"]


@pytest.mark.parametrize("said", ["bytes 0-9/10", "", "bytes 5-1048575/1048576"])
def test_part_that_was_not_asked_for_is_not_taken(fake: Fake, puller: Puller, said: str) -> None:
    def hook(request: Request) -> bool:
        if DIGEST not in request.path or len(ranges(fake)) > 2:
            return False
        if len(ranges(fake)) == 1:
            cut(request, 500_000)
        else:
            request.answer(206, LAYER[:524_288], Content_Range=said)
        return True

    fake.hook = hook
    puller(fake.image(layers=[LAYER]))
    assert puller.holds(LAYER) and ranges(fake)[2] == "", "it began anew"


def test_piece_that_rotted_is_fetched_anew(fake: Fake, puller: Puller) -> None:
    piece = puller.store.root / "tmp" / "partial" / DIGEST.partition(":")[2]
    piece.parent.mkdir(parents=True)
    piece.write_bytes(b"\0" * 500_000)
    puller(fake.image(layers=[LAYER]))
    assert puller.holds(LAYER) and ranges(fake) == ["bytes=500000-", ""]


# Registries that refuse


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_passing_failure_is_tried_again(fake: Fake, puller: Puller, status: int) -> None:
    fake.hook = lambda request: (
        "/blobs/" in request.path and not fail.append(request.path) and len(fail) == 1 and (request.answer(status) or True)
    )
    fail: list[str] = []
    puller(fake.image(layers=[LAYER]))
    assert puller.holds(LAYER)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 418])
def test_lasting_failure_is_said(fake: Fake, puller: Puller, status: int) -> None:
    body = b'{"errors": [{"code": "BAD", "message": "so \\u001b[31mred"}]}'
    fake.hook = lambda request: "/manifests/" in request.path and (request.answer(status, body) or True)
    with pytest.raises(RegistryError, match=r"BAD: so  \[31mred") as caught:
        puller(fake.image())
    assert caught.value.status == status and caught.value.hint
    assert len(fake.paths(part="/manifests/")) == (QUICK.tries if status in (429, 500) else 1)


def test_retry_after_is_waited_for(fake: Fake, puller: Puller) -> None:
    times: list[float] = []

    def hook(request: Request) -> bool:
        if "/manifests/" in request.path:
            times.append(time.monotonic())
            if len(times) == 1:
                request.answer(429, Retry_After="1")
                return True
        return False

    fake.hook = hook
    puller(fake.image())
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize("after", ["3600", "999999999999999", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_long_retry_after_is_not(fake: Fake, puller: Puller, after: str) -> None:
    fake.hook = lambda request: "/manifests/" in request.path and (request.answer(429, Retry_After=after) or True)
    with pytest.raises(RegistryError) as caught:
        puller(fake.image())
    assert "asks to wait" in caught.value.hint and len(fake.paths(part="/manifests/")) == 1


def test_nobody_there_is_said(puller: Puller) -> None:
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1\b") as caught:
        puller("127.0.0.1:1/some/app")
    assert caught.value.hint


# Registries that stall


def test_stall_in_a_body_is_cut_and_gone_on_with(fake: Fake, puller: Puller) -> None:
    def hook(request: Request) -> bool:
        if DIGEST not in request.path or len(ranges(fake)) > 1:
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(len(LAYER)))
        request.end_headers()
        request.wfile.write(LAYER[:300_000])
        gone.wait(10)
        return True

    gone = threading.Event()
    fake.hook = hook
    puller(fake.image(layers=[LAYER]), bounds=replace(QUICK, silence=1.5))
    gone.set()
    assert puller.holds(LAYER) and ranges(fake) == ["", "bytes=300000-"]


@pytest.mark.parametrize("part", ["/manifests/", DIGEST], ids=["manifest", "layer"])
def test_drip_is_a_stall(fake: Fake, puller: Puller, part: str) -> None:
    """A byte before each timeout of the socket: each wait is short, the whole would take for ever."""

    def hook(request: Request) -> bool:
        if part not in request.path:
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(len(LAYER)))
        request.end_headers()
        request.close_connection = True
        while not gone.wait(0.1):
            request.wfile.write(b"x")
        return True

    gone = threading.Event()
    fake.hook = hook
    start = time.monotonic()
    with pytest.raises(RegistryError, match=r"stalled|sent"):
        puller(fake.image(layers=[LAYER]), bounds=HASTY)
    gone.set()
    assert time.monotonic() - start < 30


def test_dripping_headers_are_a_stall(fake: Fake, puller: Puller) -> None:
    def hook(request: Request) -> bool:
        if "/manifests/" not in request.path:
            return False
        request.close_connection = True
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not gone.wait(0.1):
            request.wfile.write(b"x")
        return True

    gone = threading.Event()
    fake.hook = hook
    with pytest.raises(RegistryError, match="stalled"):
        puller(fake.image(), bounds=replace(HASTY, connect=0.5))
    gone.set()


@pytest.mark.parametrize("insecure", [False, True])
def test_stall_before_anything_is_said(puller: Puller, insecure: bool) -> None:
    """In the TLS handshake, and without TLS: it takes connections and no more."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(RegistryError, match=r"stalled|in time|broke"):
        puller(f"{socket.gethostname()}:{server.getsockname()[1]}/some/app", insecure=insecure, bounds=replace(HASTY, connect=0.2))


# Redirects


def test_redirect_to_another_host_is_followed_without_credentials(fake: Fake, puller: Puller) -> None:
    with Fake() as other:
        name = fake.image(layers=[LAYER])
        other.blobs = dict(fake.blobs)

        def hook(request: Request) -> bool:
            if not request.headers.get("Authorization"):
                request.answer(401, WWW_Authenticate='Basic realm="here"')
            elif "/blobs/" in request.path:
                request.answer(307, Location=other.url + request.path)
            else:
                return False
            return True

        fake.hook = hook
        puller(name, credentials=Credentials("me", "secret"))
        assert puller.holds(LAYER)
        assert any("Authorization" in headers for _, _, headers in fake.seen)
        assert len(other.seen) == 2 and not any("authorization" in map(str.lower, headers) for _, _, headers in other.seen)


@pytest.mark.parametrize(
    "there", ["", "ftp://example.org/x", "http://", "http://[", "http://me:pw@127.0.0.1/x", "file:///etc/passwd", "http://" + "a" * 300]
)
def test_redirect_to_nowhere_is_refused(fake: Fake, puller: Puller, there: str) -> None:
    fake.hook = lambda request: "/blobs/" in request.path and (request.answer(307, Location=there) or True)
    with pytest.raises(RegistryError):
        puller(fake.image())


def test_redirect_in_a_circle_ends(fake: Fake, puller: Puller) -> None:
    fake.hook = lambda request: "/manifests/" in request.path and (request.answer(302, Location=request.path) or True)
    with pytest.raises(RegistryError, match="redirects over 5 times"):
        puller(fake.image())
    assert len(fake.paths(part="/manifests/")) == 6


def test_redirect_from_https_to_http_is_refused() -> None:
    client = Client("example.org", credentials=Credentials(), bounds=QUICK)
    assert client._next("https://example.org/v2/a", "//other.example.org/b") == "https://other.example.org/b"
    with pytest.raises(RegistryError, match="from https to"):
        client._next("https://example.org/v2/a", "http://example.org/b")
