"""One blob from a registry into the store: hashed as it is written, gone on with where an earlier try ended.

Of two pulls of one blob, in this process or another, one downloads and the other waits for it; if the first ends early, the
other goes on from there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress

from trivisor.core.errors import ImageError, RegistryError
from trivisor.core.units import KIB
from trivisor.images.registry.client import Client, Patience
from trivisor.images.registry.partial import Partial, claim, piece
from trivisor.images.registry.wire import Answer
from trivisor.store.store import Store

Note = Callable[[int, str], object]
"""Told how many bytes are there, and what is done: "waiting", "downloading", "done", "exists"."""
LOOK = 0.1
"""Seconds between two looks at a piece that another has: flock(2) cannot be waited for with a bound."""
GAIN = 64 * KIB
"""What a try must bring to not count as failed."""
_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(?:\d{1,19}|\*)")


def fetch(client: Client, repository: str, digest: str, size: int, store: Store, owner: str, note: Note) -> None:
    """Bring the blob into the store, pinned by `owner`. Raises ImageError for a wrong one, RegistryError, StorageError, Cancelled."""
    end = time.monotonic() + client.bounds.transfer
    while not held(store, digest, size, owner):
        with claim(store, digest) as partial:
            if partial is None:
                note(_there(store, digest), "waiting")
            elif held(store, digest, size, owner):  # finished between the two looks
                partial.drop()
                break
            else:
                _download(client, repository, digest, size, partial, note)
                store.adopt(partial.path, owner, known=digest)
                partial.drop()
                note(size, "done")
                return
        if time.monotonic() > end:
            raise RegistryError(f"another pull has held {digest} for too long", hint="end it, and pull again", transient=True)
        client.wire.wait(LOOK)
    note(size, "exists")


def held(store: Store, digest: str, size: int, owner: str) -> bool:
    """Tell whether the store has the whole blob, and pin it then."""
    with suppress(FileNotFoundError):
        return store.locate(digest).stat().st_size == size and store.hold(digest, owner)
    return False


def _there(store: Store, digest: str) -> int:
    try:
        return piece(store, digest).stat().st_size
    except FileNotFoundError:
        return 0


def _download(client: Client, repository: str, digest: str, size: int, partial: Partial, note: Note) -> None:
    patience = Patience(client.wire)
    partial.load(size)
    while True:
        start = partial.position
        if start < size:
            with _get(client, repository, digest, partial) as answer:
                try:
                    _take(answer, digest, size, partial, note)
                except RegistryError as error:
                    broken: RegistryError | None = error
                else:
                    broken = None
            if broken is not None:
                if partial.position - start >= GAIN:
                    patience.gained()
                patience.wait(broken)
                continue
        if partial.digest == digest:
            return
        if not partial.resumed:
            found = partial.digest
            partial.drop()
            raise ImageError(f"{client.registry} gave {found} for {digest}", hint="its copy is damaged, or it is not the one you meant")
        partial.reset()  # what was left from before may be what is wrong


def _get(client: Client, repository: str, digest: str, partial: Partial) -> Answer:
    headers = {"Range": f"bytes={partial.position}-"} if partial.position else {}
    return client.request(
        "GET",
        f"{repository}/blobs/{digest}",
        scope=f"repository:{repository}:pull",
        what=f"blob {digest} of {repository}",
        expect=(200, 206, 416) if headers else (200,),
        headers=headers,
    )


def _take(answer: Answer, digest: str, size: int, partial: Partial, note: Note) -> None:
    if answer.status == 206:
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if not match or int(match[1]) != partial.position:
            partial.reset()
            raise RegistryError("the registry sent another part than was asked for", hint="try again", transient=True)
    elif partial.position:
        partial.reset()  # it knows no ranges, or none here: the whole comes again
        if answer.status == 416:
            raise RegistryError("the registry has no such part", hint="try again", transient=True)
    if answer.length is not None and partial.position + answer.length != size:
        _wrong_size(partial, digest, size, partial.position + answer.length)
    for data in answer.chunks():
        if partial.position + len(data) > size:
            _wrong_size(partial, digest, size, partial.position + len(data))
        partial.write(data)
        note(partial.position, "downloading")
    if partial.position < size:
        raise RegistryError(f"{digest} ended after {partial.position} of {size} bytes", hint="try again", transient=True)


def _wrong_size(partial: Partial, digest: str, size: int, found: int) -> None:
    partial.drop()
    raise ImageError(f"{digest} has {found} bytes or more where its manifest says {size}", hint="the registry's copy is damaged")
