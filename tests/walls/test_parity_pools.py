"""Pools: machines that run and are warm are handed over at once, made anew behind, and gone with whoever has them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome, in_child

from trivisor import VMM, InvalidSpec, NotFound, Pool, PoolClosed, PoolEmpty, State
from trivisor.core.spec import Wall
from trivisor.vmm import pool as pools

BOUND = 120.0
ROOT = Path(__file__).parents[2]
WARM = ["sh", "-c", "echo $$ > /run/warm; echo warm > /root/warm"]


@pytest.fixture(scope="module")
def vmm(wall_home: VmHome) -> Iterator[VMM]:
    with VMM(wall_home.root) as vmm:
        yield vmm


@pytest.fixture(scope="module")
def pool(vmm: VMM, wall: Wall) -> Iterator[Pool]:
    """One pool for all tests of this module that do it no harm."""
    with vmm.pool("debian", size=2, wall=wall, warmup=WARM) as pool:
        pool.wait(BOUND)
        yield pool


def test_each_is_warm_and_its_own(pool: Pool, wall: Wall) -> None:
    with pool.take() as one, pool.take() as other:
        assert (one.state, one.wall, one.spec.lifetime) == (State.RUNNING, wall, "process")
        assert one.files.read_text("/root/warm") == other.files.read_text("/root/warm") == "warm\n"
        assert one.exec("hostname").text == f"{one.name}\n" != other.exec("hostname").text
        one.files.write("/root/mine", b"")
        assert not other.files.exists("/root/mine")
        random = "head -c 16 /dev/urandom | od -A n -t x1"
        assert one.exec(random).text != other.exec(random).text
    pool.wait(BOUND)
    said = pool.stats()
    assert (said.size, said.ready, said.failed, said.error) == (2, 2, 0, "")
    assert said.forked is (wall != "container"), said.why
    assert said.taken >= 2


def test_one_that_ended_while_it_waited_is_not_handed_over(pool: Pool, vmm: VMM) -> None:
    pool.wait(BOUND)
    before = {machine.name for machine in vmm.list()}
    for machine in vmm.list():
        machine.stop(timeout=0)
    with pool.take(BOUND) as machine:
        assert machine.exec("echo lives").text == "lives\n"
        assert machine.name not in before
    assert pool.stats().died >= 1


def test_of_many_takers_each_has_one(pool: Pool) -> None:
    names: list[str] = []

    def take() -> None:
        with pool.take(BOUND) as machine:
            names.append(machine.exec("hostname").text)

    takers = [threading.Thread(target=take) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(BOUND)
    assert len(set(names)) == 4


def test_a_forked_child_has_none_of_it(pool: Pool, vmm: VMM) -> None:
    pool.wait(BOUND)

    def child() -> None:
        with pytest.raises(PoolClosed, match="another process"):
            pool.take()
        pool.close()

    assert in_child(child) == 0
    assert pool.stats().ready == 2
    with pool.take() as machine:
        assert machine.exec("echo here").text == "here\n"


def test_kill_9_leaves_nothing(wall_home: VmHome, vmm: VMM, wall: Wall, pool: Pool) -> None:
    pool.wait(BOUND)  # that of the other tests makes no machine meanwhile
    there, kept = {machine.id for machine in vmm.list()}, frozen(vmm)
    end, begin = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with VMM(wall_home.root) as own:
                made = own.pool("debian", size=1, wall=wall, warmup=WARM)
                made.take(BOUND)
                made.wait(BOUND)
                os.write(begin, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(begin)  # so that its end is told if it fails
    assert os.read(end, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(end)
    deadline = time.monotonic() + BOUND
    while {machine.id for machine in vmm.list()} - there:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    vmm.sweep()
    assert frozen(vmm) <= kept


def frozen(vmm: VMM) -> set[str]:
    place = vmm.home / "snapshots"
    return {entry.name for entry in place.iterdir()} if place.exists() else set()


def test_closed(vmm: VMM, wall: Wall) -> None:
    kept = frozen(vmm)
    made = vmm.pool("debian", size=1, wall=wall)
    taken = made.take(BOUND)
    made.close()
    made.close()
    with pytest.raises(PoolClosed, match="is closed"):
        made.take()
    assert taken.exec("echo still").text == "still\n"
    taken.delete(force=True)
    assert frozen(vmm) <= kept  # what it began in went with it


@pytest.mark.walls("container")
def test_what_cannot_be_made_is_said_to_who_takes(vmm: VMM, wall: Wall, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSpec, match="1 to"):
        vmm.pool("debian", size=0, wall=wall)
    with pytest.raises(InvalidSpec, match="end with the process"):
        vmm.pool("debian", wall=wall, lifetime="kept")
    with pytest.raises(NotFound):
        vmm.pool("no-such-image", wall=wall)
    monkeypatch.setattr(pools, "_BACKOFF", 60.0)
    monkeypatch.setattr(pools, "_STALE", 60.0)
    with vmm.pool("debian", size=1, wall=wall, warmup=["sh", "-c", "echo cold >&2; exit 3"]) as made:
        with pytest.raises(PoolEmpty, match="none can be made") as caught:
            made.take(BOUND)
        assert "tries again in" in caught.value.hint
        assert type(caught.value.__cause__).__name__ == "ExecFailed"
        began = time.monotonic()
        with pytest.raises(PoolEmpty):  # at once: it is not tried again before it is time
            made.take(BOUND)
        assert time.monotonic() - began < 20
        assert made.stats().failed == 1
        monkeypatch.setattr(pools, "_STALE", 0.0)
        with pytest.raises(PoolEmpty):
            made.take(BOUND)
        assert made.stats().failed == 2
    with vmm.pool("debian", size=1, wall=wall, warmup=["sleep", "60"]) as made:
        with pytest.raises(PoolEmpty, match="no machine yet"):
            made.take(0.5)
        began = time.monotonic()
        made.close()  # what is being warmed is not waited for
        assert time.monotonic() - began < 30


def test_the_example(wall_home: VmHome, wall: Wall) -> None:
    said = python(wall_home, [str(ROOT / "examples/pool.py"), "--wall", wall])
    assert re.search(r"^2\*\*100 +1267650600228229401496703205376$", said, re.MULTILINE)
    assert said.rstrip().endswith("freezes no memory" if wall == "container" else "begun in one warm one")


@pytest.mark.walls("gvisor")
def test_the_document(wall_home: VmHome, wall: Wall) -> None:
    source = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/pools.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert python(wall_home, ["-c", source]) == "42\n\n"


def python(home: VmHome, words: list[str]) -> str:
    environment = {**os.environ, "TRIVISOR_HOME": str(home.root)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stdout
