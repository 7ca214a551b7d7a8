"""What a machine says, and what is said of it: its logs, and the events of its home."""

from __future__ import annotations

import threading
import time

import pytest
from fake_engine import engine_pid
from machine_home import IMAGE, TestHome

from trivisor import VMM, InvalidSpec, Machine


def test_logs_of_the_last_life(home: TestHome, running: Machine) -> None:
    console = f"/proc/{engine_pid(home.folder(running))}/fd/1"
    running.exec(f"echo first > {console}")
    follower = running.logs(follow=True)
    assert next(follower) == b"first\n"
    running.exec(f"echo second > {console}")
    assert next(follower) == b"second\n"
    stopper = threading.Timer(0.2, running.stop)
    stopper.start()
    assert list(follower) == []
    stopper.join()
    everything = b"".join(running.logs(source="all"))
    assert b"==> serial <==\nfirst\nsecond\n" in everything
    assert b"==> init <==\n" in everything
    running.start()
    assert list(running.logs()) == []
    with pytest.raises(InvalidSpec):
        running.logs(source="diary")


@pytest.mark.parametrize("size", [3 << 20, 9 << 20])
def test_a_log_without_end_is_capped(home: TestHome, running: Machine, size: int) -> None:
    running.exec(f"head -c {size} /dev/zero > /proc/{engine_pid(home.folder(running))}/fd/1")
    deadline = time.monotonic() + 10
    while sum(map(len, running.logs())) < min(size, 5 << 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert min(size, 4 << 20) <= sum(map(len, running.logs())) <= min(size, 8 << 20)


def test_events_follow(vmm: VMM) -> None:
    last = list(vmm.events())[-1].id
    creator = threading.Timer(0.3, vmm.create, (IMAGE,))
    creator.start()
    event = next(vmm.events(since=last, follow=True, timeout=30))
    assert event.kind == "created"
    creator.join()
    began = time.monotonic()
    assert list(vmm.events(since=event.id, follow=True, timeout=0.2)) == []
    assert time.monotonic() - began < 5
