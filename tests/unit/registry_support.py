"""A registry made to hurt: it serves what it is given, and any request can be answered otherwise.

with Fake() as fake:
    name = fake.image("some/app", [layer, layer])       # 127.0.0.1:PORT/some/app:1
    fake.hook = lambda request: ...                     # True: answered already
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trivisor.images import model
from trivisor.images.reference import Reference
from trivisor.images.registry.bounds import Bounds
from trivisor.images.registry.credentials import Credentials
from trivisor.images.registry.crew import Progress
from trivisor.images.registry.pull import Pulled, pull
from trivisor.store.store import Store

QUICK = Bounds(connect=10.0, silence=15.0, document=15.0, backoff=0.01, tries=3, patience=2.0)
HASTY = replace(QUICK, silence=0.5, document=0.5, tries=2)
"""For registries that stall: with it a host under load may seem to."""
NOBODY = Credentials()
"""Keeps a developer's own Docker config out of the tests."""


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


LAYER = os.urandom(1 << 20)
DIGEST = digest_of(LAYER)


class Request(BaseHTTPRequestHandler):
    """One request; `fake` is the registry."""

    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the other side left

    def answer(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        """Send an answer; `length` is what Content-Length says instead of the truth."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None and length != len(body):
            self.close_connection = True

    def _any(self) -> None:
        with self.fake.lock:
            self.fake.seen.append((self.command, self.path, dict(self.headers.items())))
        if self.fake.hook is not None and self.fake.hook(self):
            return
        self.fake.serve(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _any


class Fake:
    """The registry. `seen` are the requests (method, path, headers) that came."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.hook: Callable[[Request], bool | None] | None = None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Request,), {"fake": self}))
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def blob(self, data: bytes, media_type: str = model.OCI_LAYER_GZIP) -> dict[str, Any]:
        """Have a blob; return its descriptor."""
        self.blobs[digest_of(data)] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    def image(
        self, repository: str = "some/app", layers: list[bytes] | None = None, tag: str = "1", changes: dict[str, Any] | None = None
    ) -> str:
        """Have an image; return its name. `changes` are to its manifest."""
        layers = [b"layer one", b"layer two"] if layers is None else layers
        config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": model.OCI_MANIFEST,
            "config": self.blob(json.dumps(config).encode(), model.OCI_CONFIG),
            "layers": [self.blob(data) for data in layers],
            **(changes or {}),
        }
        return self.manifest(repository, tag, json.dumps(manifest).encode())

    def manifest(self, repository: str, tag: str, data: bytes, media_type: str = model.OCI_MANIFEST) -> str:
        for name in (tag, digest_of(data)):
            self.manifests[f"{repository}/{name}"] = (data, media_type)
        return f"{self.host}/{repository}:{tag}"

    def paths(self, method: str = "GET", part: str = "/blobs/") -> list[str]:
        """Return which paths were asked for."""
        return [path for how, path, _ in self.seen if how == method and part in path]

    def serve(self, request: Request) -> None:
        """Answer as a registry does."""
        path = request.path.partition("?")[0]
        blob = re.fullmatch(r"/v2/(.+)/blobs/(sha256:[0-9a-f]+)", path)
        manifest = re.fullmatch(r"/v2/(.+)/manifests/(.+)", path)
        if path == "/v2/":
            request.answer(200, b"{}")
        elif blob and blob[2] in self.blobs:
            _part(request, self.blobs[blob[2]])
        elif manifest and f"{manifest[1]}/{manifest[2]}" in self.manifests:
            data, media_type = self.manifests[f"{manifest[1]}/{manifest[2]}"]
            request.answer(200, data, Content_Type=media_type, Docker_Content_Digest=digest_of(data))
        else:
            request.answer(404, b'{"errors": [{"code": "NAME_UNKNOWN", "message": "not\\u001b[2J here"}]}')


def _part(request: Request, data: bytes) -> None:
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    if not match:
        request.answer(200, data)
    elif int(match[1]) >= len(data):
        request.answer(416)
    else:
        start = int(match[1])
        request.answer(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")


class Puller:
    """A store, and pulls into it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.events: list[Progress] = []

    def __call__(self, name: str, **options: Any) -> Pulled:
        """Pull, and keep what was pulled."""
        options = {"bounds": QUICK, "credentials": NOBODY, "report": self.events.append, **options}
        with self.store.workspace() as work:
            pulled = pull(Reference.parse(name), self.store, work, **options)
            self.store.pin(pulled.digest, "test")
        return pulled

    def states(self, digest: str) -> list[str]:
        """Return the states of a blob, each once."""
        return list(dict.fromkeys(event.state for event in self.events if event.digest == digest))

    def holds(self, data: bytes) -> bool:
        """Tell whether the store has it, right."""
        return self.store.exists(digest_of(data)) and self.store.path(digest_of(data)).read_bytes() == data

    def pieces(self) -> dict[str, int]:
        """Return the size of each piece that is left, by digest."""
        sizes: dict[str, int] = {}
        for path in (self.store.root / "tmp" / "partial").glob("*"):
            with suppress(FileNotFoundError):  # another process's, whole meanwhile
                sizes[f"sha256:{path.name}"] = path.stat().st_size
        return sizes

    def empty(self) -> bool:
        """Tell whether nothing was stored."""
        return not list((self.store.root / "blobs").rglob("*/*"))


def ranges(fake: Fake) -> list[str]:
    """The Range header of each request for the layer."""
    return [headers.get("Range", "") for _, path, headers in fake.seen if DIGEST in path]
