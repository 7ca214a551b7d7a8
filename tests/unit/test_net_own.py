"""What holds for one machine alone: in the kernel while it runs, and gone with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from net_support import run

from trivisor.core.errors import InvalidSpec
from trivisor.core.network import Shape, shape
from trivisor.core.spec import Spec
from trivisor.launch.net import own
from trivisor.launch.net.own import Own


def test_rules_are_about_one_interface() -> None:
    made = own.rules(Own("trv7", Shape(loss=0.25, rate_out=5000), ("10.213.128.2",)))
    assert [str(rule) for rule in made] == [
        "from: iifname trv7 daddr 10.213.128.2 drop",
        "to: oifname trv7 saddr 10.213.128.2 drop",
        "from: iifname trv7 lost 0.250000 drop",
        "to: oifname trv7 lost 0.250000 drop",
        "from: iifname trv7 over 5000 drop",
    ]
    asked = [str(rule) for rule in own.rules(Own("trv7", reach=("host", "metadata")))]
    assert asked[:2] == ["from: iifname trv7 mark 0x74720001", "from: iifname trv7 daddr 0.0.0.0/8 mark 0x74720002"]
    assert own.rules(Own("trv7", Shape(latency=1, rate_in=5000))) == []  # queues do that


def test_shapes_as_people_write_them() -> None:
    assert shape({"rate_in": "1M", "rate_out": 4096, "latency": "50ms", "loss": 0.1}) == Shape(
        rate_in=1 << 20, rate_out=4096, latency=0.05, loss=0.1
    )
    assert not shape({}) and not shape({"latency": 0, "loss": 0, "rate_in": None})


@pytest.mark.parametrize(
    "wish",
    [
        {"rate_in": 10},
        {"rate_out": "x"},
        {"latency": -1},
        {"latency": 61},
        {"loss": 1.1},
        {"loss": True},
        {"loss": "1"},
        {"jitter": 1},
        [],
        5,
    ],
)
def test_what_is_no_shape(wish: object) -> None:
    with pytest.raises(InvalidSpec):
        shape(wish)


@pytest.mark.parametrize(
    "wishes",
    [
        {"shape": {"loss": 0.5}},
        {"shape": {"loss": 0.5}, "network": "host"},
        {"cut": "b", "network": "nat"},
        {"cut": ["a"], "network": "back"},
        {"cut": ["B!"], "network": "back"},
    ],
)
def test_what_a_spec_refuses(wishes: dict[str, object]) -> None:
    with pytest.raises(InvalidSpec):
        Spec.make(image="i", name="a", wall="container", **wishes)


def test_what_a_machine_sends_is_bounded_and_lost(tmp_path: Path) -> None:
    code = """
from trivisor.launch.net import own
from trivisor.core.network import Shape
one, two = machine("one"), machine("two")

def counting():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    server.bind(("203.0.113.1", 99))
    return server
server = inside(away, counting)

def sent(link, wait=0.3):
    "How many of 1000 datagrams of 1000 bytes arrive, and in how many seconds they were sent; `wait`: seconds for one more."
    def send():
        began = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for number in range(1000):
                client.sendto(bytes(972), ("203.0.113.1", 99))
                if number % 50 == 49:
                    time.sleep(0.001)  # no more at once than the kernel may keep until it gets a processor
        return time.monotonic() - began
    took = inside(link.fd, send)
    server.settimeout(wait)
    count = 0
    with contextlib.suppress(TimeoutError):
        while count < 1000 and server.recv(2000):
            count += 1
    return count, took

def all_arrive(link):
    return sent(link, SURE)[0] == 1000

with own.keep() as kernel:
    apply = lambda shape, cut=(): own.apply(kernel, "abc", own.Own(one.block.interface, shape, cut))
    assert all_arrive(one)
    apply(Shape(rate_out=250_000))
    count, took = sent(one)
    assert 350 < count < 600 + 250 * took  # a second's worth, and 128 KiB, and what it may have sent meanwhile
    assert all_arrive(two)
    apply(Shape(loss=0.5))
    assert 400 < sent(one)[0] < 600
    apply(Shape(), ["203.0.113.1"])
    assert sent(one)[0] == 0 and all_arrive(two)
    apply(Shape(loss=1))  # replaced whole: the address is free, all else is lost
    assert inside(one.fd, lambda: ask("203.0.113.1", 80)) == "TimeoutError"
    apply(Shape())
    assert all_arrive(one)
    apply(Shape(loss=1))
    other = os.dup(kernel.fileno())  # as the helper holds it
assert sent(one)[0] == 0
os.close(other)
assert all_arrive(one)  # the table went with its last holder
"""
    run(code, tmp_path)


def test_nobody_else_changes_a_machines_table(tmp_path: Path) -> None:
    code = """
from trivisor.core.errors import HostLacks
from trivisor.launch.net import own
from trivisor.core.network import Shape
one = machine("one")
with own.keep() as kernel, own.keep() as other:
    own.apply(kernel, "abc", own.Own(one.block.interface, Shape(loss=1)))
    try:
        own.apply(other, "abc", own.Own(one.block.interface, Shape()))
    except HostLacks:
        pass
    else:
        raise AssertionError
    assert inside(one.fd, lambda: ask("203.0.113.1", 80)) == "TimeoutError"
"""
    run(code, tmp_path)


def test_what_reaches_a_machine_waits_its_turn(tmp_path: Path) -> None:
    code = """
from trivisor.core.errors import HostLacks
from trivisor.launch.net import own
from trivisor.core.network import Shape
one = machine("one")
def bulk():
    server = socket.create_server(("203.0.113.1", 81))
    def loop():
        while True:
            client, _ = server.accept()
            with client:
                client.sendall(bytes(300_000))
    threading.Thread(target=loop, daemon=True).start()
inside(away, bulk)
def took():
    begun = time.monotonic()
    with socket.create_connection(("203.0.113.1", 81), timeout=SURE) as client:
        while client.recv(65536):
            pass
    return time.monotonic() - begun
def at_once():
    return any(inside(one.fd, took) < 0.3 for _ in range(20))  # anything may be late on a busy host, but not always
with own.keep() as kernel:
    assert at_once()
    own.apply(kernel, "abc", own.Own(one.block.interface, Shape(rate_in=500_000)))
    assert 0.3 < inside(one.fd, took) < SURE
    try:
        own.apply(kernel, "abc", own.Own(one.block.interface, Shape(latency=0.2)))
    except HostLacks as error:
        assert "sch_netem" in str(error)
    else:
        begun = time.monotonic()
        assert inside(one.fd, lambda: ask("203.0.113.1", 80, SURE)) == "192.0.2.2"
        assert time.monotonic() - begun > 0.2
    own.apply(kernel, "abc", own.Own(one.block.interface, Shape()))
    assert at_once()
"""
    run(code, tmp_path)
