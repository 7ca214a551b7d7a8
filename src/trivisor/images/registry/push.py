"""An image from the store to a registry: blobs that it lacks, several at a time, then the manifest under its tag.

A blob is asked for (HEAD), then mounted from another repository of the same registry if the caller knows one, then sent: in one
request where it is small, else in pieces, so that a broken connection costs one piece (distribution-spec, "Pushing blobs").
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlencode, urlsplit

from trivisor.core.errors import ImageError, InvalidSpec, NotFound, RegistryError
from trivisor.images import model
from trivisor.images.reference import Reference
from trivisor.images.registry.bounds import DEFAULT, ERROR, Bounds
from trivisor.images.registry.client import Client, Patience
from trivisor.images.registry.credentials import Credentials
from trivisor.images.registry.crew import Job, Note, Report, together
from trivisor.images.registry.pull import SOURCE
from trivisor.images.registry.wire import Answer, address
from trivisor.store.faults import translated
from trivisor.store.store import Store

_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,19})")
_OCTETS = "application/octet-stream"


def push(
    reference: Reference,
    store: Store,
    digest: str,
    *,
    media_type: str = "",
    mount_from: Sequence[str] = (),
    credentials: Credentials | None = None,
    insecure: bool = False,
    report: Report = lambda _: None,
    bounds: Bounds = DEFAULT,
) -> str:
    """Push the image whose manifest is the blob `digest` to where `reference` says, and return that digest.

    `media_type` is the manifest's, if it does not say; `mount_from` are repositories of the same registry that may have its blobs.
    Raises InvalidSpec for a reference to another digest, NotFound for blobs that the store lacks, RegistryError, and what
    `credentials.stored` raises.
    """
    if reference.digest and reference.digest != digest:
        raise InvalidSpec(f"{reference} names another image than {digest}", hint="push to a tag")
    with store.workspace() as work:
        store.pin(digest, work.owner, durable=False)  # a collection meanwhile leaves it whole
        data = _manifest(store, digest, bounds)
        manifest = model.read_manifest(data, "", str(reference))
        kind = manifest.media_type or media_type or model.OCI_MANIFEST
        blobs = {blob.digest: blob.size for blob in (*manifest.layers, manifest.config)}
        files = {blob: store.path(blob) for blob in blobs}  # all of it is here, or nothing is sent
        client = Client(reference.registry, credentials=credentials, insecure=insecure, bounds=bounds)
        try:
            target = Target(client, reference.repository, [other for other in mount_from if other != reference.repository])
            jobs = [(blob, blobs[blob], _job(target, blob, file)) for blob, file in files.items()]
            together(jobs, bounds.parallel, report, client.cancel)
            target.name(data, digest, kind, reference.tag or digest)
        finally:
            client.close()
    return digest


def neighbours(target: Reference, source: str) -> list[str]:
    """Return the repositories beside `target` that may have the blobs of an image from `source` (Pulled.source, or anything)."""
    if not source.startswith(SOURCE):
        return []
    origin = Reference.parse(source.removeprefix(SOURCE))
    return [origin.repository] if origin.registry == target.registry and origin.repository != target.repository else []


def _manifest(store: Store, digest: str, bounds: Bounds) -> bytes:
    path = store.path(digest)
    with translated(path):
        if path.stat().st_size > bounds.manifest:
            raise ImageError(f"{digest} is larger than a manifest may be", hint="push the digest of an image")
        return path.read_bytes()


def _job(target: Target, digest: str, file: Path) -> Job:
    def job(note: Note) -> None:
        target.send(digest, file, note)

    return job


class Target:
    """A repository that takes an image."""

    def __init__(self, client: Client, repository: str, mount_from: Sequence[str]) -> None:
        self._client = client
        self._repository = repository
        self._mount_from = mount_from
        scopes = [f"repository:{repository}:pull,push", *(f"repository:{other}:pull" for other in mount_from)]
        self._scope = " ".join(scopes)

    def send(self, digest: str, file: Path, note: Note) -> None:
        """See to it that the registry has the blob. Raises RegistryError, StorageError, Cancelled."""
        size = file.stat().st_size
        if self._there(digest, size):
            note(size, "exists")
            return
        patience = Patience(self._client.wire)
        while True:
            location = self._open(digest)
            if not location:
                note(size, "exists")
                return
            try:
                self._upload(location, digest, file, size, note)
                note(size, "done")
                return
            except (RegistryError, NotFound) as error:
                # An upload that the registry has forgotten begins again.
                patience.wait(error if isinstance(error, RegistryError) else RegistryError(error.message, hint=error.hint, transient=True))

    def name(self, manifest: bytes, digest: str, media_type: str, tag: str) -> None:
        """Put the manifest: from now on the image is there. Raises RegistryError."""
        with self._client.request(
            "PUT",
            f"{self._repository}/manifests/{tag}",
            scope=self._scope,
            what=f"manifest {tag} of {self._repository}",
            expect=(200, 201),
            headers={"Content-Type": media_type},
            body=manifest,
        ) as answer:
            answer.document(ERROR, "the answer to a manifest")
            said = answer.headers.get("Docker-Content-Digest", digest)
        if said.startswith("sha256:") and said != digest:
            raise RegistryError(
                f"{self._client.registry} made {said[:80]!r} of {digest}", hint="it changes what is pushed: use another registry"
            )

    def _there(self, digest: str, size: int) -> bool:
        with self._request("HEAD", f"{self._repository}/blobs/{digest}", digest, expect=(200, 404)) as answer:
            answer.read()
            return answer.status == 200 and answer.length in (None, size)

    def _open(self, digest: str) -> str:
        """Begin an upload and return where it goes; "" if the blob was mounted."""
        path = f"{self._repository}/blobs/uploads/"
        for other in self._mount_from:
            query = urlencode({"mount": digest, "from": other})
            with self._request("POST", f"{path}?{query}", digest, expect=(201, 202), headers={"Content-Length": "0"}) as answer:
                answer.document(ERROR, "the answer to a mount")
                if answer.status == 201:
                    return ""
                if other == self._mount_from[-1]:
                    return self._location(answer)
        with self._request("POST", path, digest, expect=(202,), headers={"Content-Length": "0"}) as answer:
            answer.document(ERROR, "the answer to an upload")
            return self._location(answer)

    def _upload(self, location: str, digest: str, file: Path, size: int, note: Note) -> None:
        chunk, done = self._client.bounds.chunk, 0
        patience = Patience(self._client.wire)
        while size > chunk and done < size:
            end = min(done + chunk, size)
            headers = {"Content-Range": f"{done}-{end - 1}", "Content-Length": str(end - done), "Content-Type": _OCTETS}
            try:
                with self._request("PATCH", location, digest, (202,), headers, _part(file, done, end, note), retry=False) as answer:
                    answer.document(ERROR, "the answer to a piece")
                    location, done = self._location(answer), end
                    patience.gained()
            except RegistryError as error:
                patience.wait(error)
                location, done = self._resume(location, digest, size)
        headers = {"Content-Length": str(size - done), "Content-Type": _OCTETS}
        url = f"{location}{'&' if urlsplit(location).query else '?'}{urlencode({'digest': digest})}"
        with self._request("PUT", url, digest, (201, 204), headers, _part(file, done, size, note), retry=False) as answer:
            answer.document(ERROR, "the answer to a blob")

    def _resume(self, location: str, digest: str, size: int) -> tuple[str, int]:
        """Ask how far an upload is."""
        with self._request("GET", location, digest, expect=(204,)) as answer:
            answer.read()
            match = _RANGE.fullmatch(answer.headers.get("Range", ""))
            there = int(match[1]) + 1 if match and match[1] != "0" else 0
            if there > size:
                raise NotFound(f"{self._client.registry} has {there} of {size} bytes of {digest}")  # the upload begins again
            return self._location(answer), there

    def _location(self, answer: Answer) -> str:
        location = answer.headers.get("Location", "")
        there = address(location, answer.url)
        if there is None or (there.scheme == "http" and urlsplit(answer.url).scheme == "https"):
            raise RegistryError(f"{self._client.registry} takes uploads at {location[:200]!r}: refused", hint="is this a registry?")
        return there.geturl()

    def _request(
        self,
        method: str,
        target: str,
        digest: str,
        expect: Sequence[int],
        headers: dict[str, str] | None = None,
        body: Callable[[], IO[bytes]] | None = None,
        *,
        retry: bool = True,
    ) -> Answer:
        what = f"blob {digest} in {self._repository}"
        return self._client.request(method, target, scope=self._scope, what=what, expect=expect, headers=headers, body=body, retry=retry)


def _part(file: Path, start: int, end: int, note: Note) -> Callable[[], IO[bytes]]:
    return lambda: io.BufferedReader(_Part(file, start, end, note), 1 << 18)


class _Part(io.RawIOBase):
    """The bytes [start, end) of a blob, that tells how far it was read."""

    def __init__(self, file: Path, start: int, end: int, note: Note) -> None:
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._at, self._end, self._note = start, end, note

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.pread(self._fd, min(len(buffer), self._end - self._at), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        self._note(self._at, "uploading")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()
