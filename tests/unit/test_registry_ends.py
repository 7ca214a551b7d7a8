"""Pulls that end in the middle, or meet one another: what came is kept, nothing half-true is, and each blob is fetched once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from registry_support import DIGEST, LAYER, QUICK, Fake, Puller, Request, digest_of, ranges

from trivisor.core.errors import StorageError
from trivisor.images.registry.crew import Progress
from trivisor.store.store import Store


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as registry:
        yield registry


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


def cut_off(request: Request, after: int, until: threading.Event) -> None:
    """Send so much of the layer, and no more."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(LAYER)))
    request.end_headers()
    request.wfile.write(LAYER[:after])
    until.wait(60)


def test_two_pulls_at_once_fetch_each_blob_once(fake: Fake, tmp_path: Path) -> None:
    go = threading.Event()

    def hook(request: Request) -> bool:
        if DIGEST in request.path:
            go.wait(30)  # until both want it
        return False

    fake.hook = hook
    name = fake.image(layers=[LAYER])
    pullers = [Puller(tmp_path), Puller(tmp_path)]

    def report(own: Puller, event: Progress) -> None:
        own.events.append(event)
        if event.state == "waiting":
            go.set()

    threads = [threading.Thread(target=lambda own=own: own(name, report=lambda event: report(own, event))) for own in pullers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ranges(fake)) == 1 and pullers[0].holds(LAYER) and pullers[0].pieces() == {}
    assert sorted("waiting" in own.states(DIGEST) for own in pullers) == [False, True]
    assert {own.states(DIGEST)[-1] for own in pullers} == {"done", "exists"}


def test_layers_come_side_by_side(fake: Fake, puller: Puller) -> None:
    """Neither of them ends before the other has begun."""
    begun = {digest_of(data): threading.Event() for data in (b"one", b"two")}

    def hook(request: Request) -> bool:
        for digest, event in begun.items():
            if digest in request.path:
                event.set()
                assert all(other.wait(60) for other in begun.values())
        return False

    fake.hook = hook
    puller(fake.image(layers=[b"one", b"two"]))
    assert puller.holds(b"one") and puller.holds(b"two")


def test_error_of_the_caller_ends_it(fake: Fake, puller: Puller) -> None:
    """As Ctrl-C does: whatever comes up in the calling thread cancels all, at once, and what came is kept."""
    stalled = threading.Event()

    def hook(request: Request) -> bool:
        if DIGEST not in request.path:
            return False
        cut_off(request, 400_000, stalled)
        return True

    def report(event: Progress) -> None:
        if event.digest == DIGEST and event.done:
            raise KeyboardInterrupt

    fake.hook = hook
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        puller(fake.image(layers=[LAYER]), report=report)
    assert time.monotonic() - start < 12
    stalled.set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blob-")]
    fake.hook = None
    puller(fake.image(layers=[LAYER]))
    assert puller.holds(LAYER) and int(ranges(fake)[-1].strip("bytes=-")) > 0


def test_who_waits_for_an_answer_is_woken_too(fake: Fake, puller: Puller) -> None:
    """Not a byte has come yet: only the connection itself can be cut."""
    stalled = threading.Event()
    fake.hook = lambda request: DIGEST in request.path and (stalled.wait(60) or True)

    def report(event: Progress) -> None:
        if event.state == "done":
            raise KeyboardInterrupt

    name = fake.image(layers=[LAYER, b"small"])
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        puller(name, report=report)
    assert time.monotonic() - start < 12
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blob-")]
    stalled.set()


PULL = """
import sys
from pathlib import Path
from registry_support import Puller
Puller(Path(sys.argv[2]))(sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_pull_is_gone_on_with(fake: Fake, puller: Puller, tmp_path: Path, number: int) -> None:
    end = threading.Event()

    def hook(request: Request) -> bool:
        if DIGEST not in request.path:
            return False
        cut_off(request, 512 << 10, end)
        return True

    fake.hook = hook
    name = fake.image(layers=[b"other", LAYER])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", PULL, name, tmp_path], env=env, stderr=subprocess.DEVNULL) as child:
        try:
            deadline = time.monotonic() + 60
            while puller.pieces().get(DIGEST, 0) < 512 << 10 and time.monotonic() < deadline:
                time.sleep(0.01)  # another process's write: there is no event for it
            child.send_signal(number)
            child.wait(30)
        finally:
            child.kill()
            end.set()
    assert puller.pieces()[DIGEST] == 512 << 10
    Store(tmp_path / "store").collect()
    assert puller.empty(), "nothing half-true: the blobs of a dead pull go"
    fake.hook = None
    puller(name)
    assert puller.holds(LAYER) and ranges(fake)[-1] == f"bytes={512 << 10}-"


def test_waiting_pull_takes_over_from_one_that_dies(fake: Fake, puller: Puller, tmp_path: Path) -> None:
    end = threading.Event()

    def hook(request: Request) -> bool:
        if DIGEST not in request.path or len(ranges(fake)) > 1:
            return False
        cut_off(request, 512 << 10, end)
        return True

    fake.hook = hook
    name = fake.image(layers=[LAYER])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", PULL, name, tmp_path], env=env, stderr=subprocess.DEVNULL) as child:

        def report(event: Progress) -> None:
            if event.state == "waiting" and event.done == 512 << 10:
                child.kill()

        try:
            deadline = time.monotonic() + 60
            while not puller.pieces().get(DIGEST) and time.monotonic() < deadline:
                time.sleep(0.01)  # another process's write: there is no event for it
            puller(name, report=report)
        finally:
            child.kill()
            end.set()
    assert puller.holds(LAYER) and ranges(fake) == ["", f"bytes={512 << 10}-"]


def test_full_disk_is_said_and_given_back(fake: Fake, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    try:
        puller = Puller(disk)

        def hook(request: Request) -> bool:
            if DIGEST in request.path:  # there was room when we asked; another program was faster
                with (disk / "filler").open("wb") as file:
                    facts = os.statvfs(disk)
                    os.posix_fallocate(file.fileno(), 0, (facts.f_bavail - 64) * facts.f_bsize)
            return False

        fake.hook = hook
        with pytest.raises(StorageError, match="No space left") as caught:
            puller(fake.image(layers=[LAYER]), bounds=replace(QUICK, parallel=1))
        assert caught.value.hint and DIGEST not in puller.pieces()
        (disk / "filler").unlink()
        fake.hook = None
        puller(fake.image(layers=[LAYER]))
        assert puller.holds(LAYER)
        puller.store.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
