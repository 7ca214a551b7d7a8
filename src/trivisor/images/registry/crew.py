"""Blobs several at a time: threads do them, the caller's own thread hears how far they are.

So a progress callback runs where its owner is, what it raises ends the work as an error of a blob does, and so does Ctrl-C.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

GRACE = 2.0
"""Seconds to wait for threads that were told to stop; one that is in a name lookup ends by itself, and harms nothing until then."""
APART = 0.05
"""Seconds between two reports of one blob."""


@dataclass(frozen=True)
class Progress:
    """How far a blob is. `state`: "queued", "waiting" for another pull of it, "downloading", "uploading", "done", or "exists" already.

    Each blob is "queued" before anything else is done, so that a bar can be drawn for each from the start.
    """

    digest: str
    done: int
    total: int
    state: str


Report = Callable[[Progress], object]
Note = Callable[[int, str], object]
Job = Callable[[Note], None]


_Jobs = queue.SimpleQueue[tuple[str, int, Job]]
_Events = queue.SimpleQueue[Progress | BaseException | None]


def together(jobs: Sequence[tuple[str, int, Job]], width: int, report: Report, cancel: Callable[[], None]) -> None:
    """Do the jobs (digest, size, what to do), `width` at a time. Raises what the first that fails raises, the others cancelled."""
    todo: _Jobs = queue.SimpleQueue()
    events: _Events = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    count = min(width, len(jobs))
    threads = [threading.Thread(target=_work, args=(todo, events), name=f"blob-{n}", daemon=True) for n in range(count)]
    try:
        for digest, size, _ in jobs:
            report(Progress(digest, 0, size, "queued"))
        for thread in threads:
            thread.start()
        _hear(events, len(threads), report)
    except BaseException:
        cancel()
        end = time.monotonic() + GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(end - time.monotonic(), 0.0))
        raise


def _work(todo: _Jobs, events: _Events) -> None:
    try:
        with suppress(queue.Empty):
            while True:
                digest, size, job = todo.get_nowait()
                job(_noter(digest, size, events))
    except BaseException as error:
        events.put(error)
    else:
        events.put(None)


def _hear(events: _Events, left: int, report: Report) -> None:
    while left:
        event = events.get()  # it comes: each wait of a job is bounded
        if isinstance(event, BaseException):
            raise event
        if event is None:
            left -= 1
        else:
            report(event)


def _noter(digest: str, size: int, events: _Events) -> Note:
    last, before = 0.0, ""

    def note(done: int, state: str) -> None:
        nonlocal last, before
        now = time.monotonic()
        if state != before or now - last >= APART:
            last, before = now, state
            events.put(Progress(digest, done, size, state))

    return note
