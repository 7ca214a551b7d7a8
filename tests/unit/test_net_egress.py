"""Egress by address and port, on a real kernel: what is let through, what is not, and what is said of it."""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
from pathlib import Path

import pytest
from net_support import run

from trivisor.core.errors import InvalidSpec
from trivisor.core.network import Egress, Name, Target, egress
from trivisor.core.spec import Spec
from trivisor.launch.net import own, policy, provide
from trivisor.launch.net.own import Helper, Own
from trivisor.vos.network.decisions import Decision, Decisions, decision, named


@pytest.mark.parametrize(
    ("text", "network", "ports"),
    [
        ("192.0.2.7", "192.0.2.7/32", None),
        ("192.0.2.0/24", "192.0.2.0/24", None),
        ("192.0.2.7:443", "192.0.2.7/32", (443, 443)),
        ("0.0.0.0/0:1-65535", "0.0.0.0/0", (1, 65535)),
    ],
)
def test_targets(text: str, network: str, ports: tuple[int, int] | None) -> None:
    target = Target.parse(text)
    assert (target.network, target.ports) == (network, ports)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    "wish",
    [
        "192.0.2.1/24",
        "192.0.2.0/33",
        "300.0.0.1",
        "192.0.2.7:0",
        "192.0.2.7:70000",
        "192.0.2.7:9-8",
        "::1",
        "localhost",
        "*",
        "*example.com",
        "*.com",
        "a..example",
        "example.com:0",
        "example.com/tcp",
        "example.123",
        "exa mple.com",
        "",
        5,
        [5],
        {"deny": []},
    ],
)
def test_what_no_policy_is(wish: object) -> None:
    with pytest.raises(InvalidSpec):
        egress(wish)


def test_policies_as_people_write_them() -> None:
    assert egress([]) == Egress() and egress("dns") == Egress(("dns",)) == egress({"allow": ["dns", "dns"]})
    assert egress(["192.0.2.7"]) == egress(egress(["192.0.2.7/32"]))
    with pytest.raises(InvalidSpec, match="256"):
        egress([f"10.0.{number >> 8}.{number & 255}" for number in range(257)])
    spec = Spec.make(image="i", name="a", wall="vm", network="nat", egress=[])
    assert spec.egress == Egress()
    with pytest.raises(InvalidSpec, match="network"):
        Spec.make(image="i", name="a", wall="vm", egress=[])


def test_names_as_people_write_them() -> None:
    assert egress(["PyPI.Example.", "*.example.org:443", "git.example.org:22/tcp", "b\u00fccher.example:80-81"]) == Egress(
        ("pypi.example", "*.example.org:443", "git.example.org:22/tcp", "xn--bcher-kva.example:80-81")
    )
    both = egress(["dns", "10.0.0.0/8", "pypi.example"])
    assert both.targets == (Target("10.0.0.0/8"),) and both.names == (Name("pypi.example"),)
    assert policy.text(both) == "closed\nname pypi.example 1 65535 seen\naddress 10.0.0.0 8\n"
    assert policy.text(egress("*.a.b:22/tcp")) == "closed\nname *.a.b 22 22 plain\n" and policy.text(None) == "open\n"
    assert egress(egress(both)) == both


def test_rules_end_in_drops_both_ways() -> None:
    wish = Own("trv7", egress=Egress(("dns", "192.0.2.0/24:80-90")), resolvers=("9.9.9.9",))
    made = [str(rule) for rule in own.rules(wish, logged=False)]
    assert made[:2] == ["from: iifname trv7 direction reply accept", "to: oifname trv7 direction original accept"]
    assert "from: iifname trv7 ports udp daddr accept" in made and "to: oifname trv7 ports tcp saddr accept" in made
    assert made[-2:] == ["from: iifname trv7 drop", "to: oifname trv7 drop"]
    assert own.group("trv7") == 8
    dns, web = int(ipaddress.IPv4Address("9.9.9.9")), int(ipaddress.IPv4Address("192.0.2.0"))
    assert [one.pieces for one in own.sets(wish)] == [[], [(dns, dns, 53, 53), (web, web + 255, 80, 90)]]


def test_what_a_machine_begins_goes_to_its_helper_where_names_are_allowed() -> None:
    wish = Own("trv7", egress=Egress(("dns", "a.example", "10.0.0.0/8")), resolvers=("9.9.9.9",), helper=Helper.parse("10.1.0.1 5 6 7"))
    made = [str(rule) for rule in own.rules(wish, logged=False)]
    redirected = [line for line in made if line.startswith("redirect")]
    assert redirected[:2] == ["redirect: iifname trv7 udp to 53-53 redirect 5", "redirect: iifname trv7 tcp to 53-53 redirect 6"]
    assert redirected[-1] == "redirect: iifname trv7 tcp to 1-65535 redirect 7"
    assert not any(line.startswith("from") for line in made)  # it is looked at when it has got there
    assert made[-2:] == ["out: iifname trv7 drop", "to: oifname trv7 drop"]
    assert own.sets(wish)[1].pieces == []  # whom it asks for names is not its choice


def test_addresses_are_cut_into_pieces_that_do_not_overlap() -> None:
    targets = [
        Target.parse(line) for line in ("10.0.0.0/8:80-90", "10.0.0.0/9:443", "10.0.0.0/9:85-100", "10.128.0.0/9:80-90", "1.0.0.0/8:53")
    ]
    ten, middle, one = (int(ipaddress.IPv4Address(start)) for start in ("10.0.0.0", "10.128.0.0", "1.0.0.0"))
    assert policy.ports(targets) == [
        (one, one + (1 << 24) - 1, 53, 53),
        (ten, middle - 1, 80, 100),
        (ten, middle - 1, 443, 443),
        (middle, ten + (1 << 24) - 1, 80, 90),
    ]
    assert policy.ports([Target.parse("10.0.0.0/9:80"), Target.parse("10.128.0.0/9:80")]) == [(ten, ten + (1 << 24) - 1, 80, 80)]
    assert policy.hosts([Target.parse("10.0.0.0/9"), Target.parse("10.0.0.0/8"), Target.parse("1.2.3.4:5")]) == [
        (ten, ten + (1 << 24) - 1, 0, 255)
    ]
    for _ in range(3):  # as a model that looks at each
        draw = [Target(f"10.0.0.{8 * random.randrange(32)}/29", tuple(sorted(random.choices(range(1, 9), k=2)))) for _ in range(12)]
        pieces = policy.ports(draw)
        for address in range(ten, ten + 256):
            for port in range(1, 9):
                found = [piece for piece in pieces if piece[0] <= address <= piece[1] and piece[2] <= port <= piece[3]]
                wanted = any(
                    ipaddress.IPv4Address(address) in ipaddress.IPv4Network(target.network) and target.ports[0] <= port <= target.ports[1]
                    for target in draw
                )
                assert len(found) == wanted


POLICIES = """
from trivisor.core.network import Egress
from trivisor.core.errors import Busy
from trivisor.launch.net import own
from trivisor.vos.network.decisions import Decisions
one = machine("one")
inside(away, lambda: serve("0.0.0.0", 81))
def talk():
    server = socket.create_server(("203.0.113.1", 82))
    def loop():
        while True:
            client, _ = server.accept()
            def echo(client=client):
                with client, contextlib.suppress(OSError):
                    while data := client.recv(100):
                        client.sendall(data)
            threading.Thread(target=echo, daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()
inside(away, talk)
inside(one.fd, lambda: serve("0.0.0.0", 8080))
def reach(*places, as_wanted):
    "Whether just those are reached that are wanted."
    said = [inside(one.fd, lambda: ask(*place, SURE if wanted else 0.7)) for place, wanted in zip(places, as_wanted)]
    return [answer == "192.0.2.2" for answer in said] == as_wanted
A, B, C = ("203.0.113.1", 80), ("203.0.113.1", 81), ("192.0.2.1", 80)
with own.keep() as kernel:
    def allow(*lines):
        own.apply(kernel, "abc", own.Own(one.block.interface, egress=Egress(lines), resolvers=("203.0.113.1",)))
    assert reach(A, B, C, as_wanted=[True, True, True])
    allow()
    assert reach(A, B, C, as_wanted=[False, False, False])
    assert ask(one.block.address, 8080, SURE) == one.block.gateway  # it answers others
    allow("203.0.113.1:80")
    assert reach(A, B, C, as_wanted=[True, False, False])
    allow("203.0.113.0/24")
    assert reach(A, B, C, as_wanted=[True, True, False])
    allow("0.0.0.0/0:79-80")
    assert reach(A, B, C, as_wanted=[True, False, True])
    allow(*(f"198.51.{number}.0/24:80-90" for number in range(255)), "203.0.113.1:81")  # as many as there may be
    assert reach(A, B, C, as_wanted=[False, True, False])
    allow("0.0.0.0/0")
    assert reach(A, B, C, ("169.254.169.254", 80), as_wanted=[True, True, True, False])  # what is denied to all stays denied
    # Under an open connection.
    allow("203.0.113.1:82")
    def connect():
        return socket.create_connection(("203.0.113.1", 82), timeout=SURE)
    client = inside(one.fd, connect)
    def echoes(timeout=SURE):
        try:
            client.settimeout(timeout)
            client.sendall(b"x")
            return client.recv(10)
        except TimeoutError:
            return None
    assert echoes() == b"x"
    allow("203.0.113.1:80")
    assert echoes(1) is None
    allow("dns", "203.0.113.1:82")
    assert b"x" in echoes()  # what waited goes on
    # Fragments are put together before they are looked at; IPv6 there is none.
    def fragments():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(4000), ("203.0.113.1", 80))
            sender.sendto(b"q", ("203.0.113.1", 53))
    with Decisions(own.group(one.block.interface)) as decisions:
        try:
            Decisions(own.group(one.block.interface))
        except Busy:
            pass
        else:
            raise AssertionError
        assert reach(A, as_wanted=[False])
        inside(one.fd, connect).close()
        inside(one.fd, fragments)
        wanted = {(False, "tcp", "203.0.113.1", 80), (True, "tcp", "203.0.113.1", 82)}
        wanted |= {(False, "udp", "203.0.113.1", 80), (True, "udp", "203.0.113.1", 53)}
        found, deadline = set(), time.monotonic() + SURE
        while not wanted <= found and time.monotonic() < deadline:
            if (decision := decisions.read(0.5)) is not None:
                found.add((decision.allowed, decision.protocol, decision.address, decision.port))
                assert abs(decision.time - time.time()) < SURE
        assert wanted <= found, found
    Decisions(own.group(one.block.interface)).close()  # free again
assert reach(A, B, C, as_wanted=[True, True, True])
"""


def test_a_policy_holds_at_once_and_says_what_it_decides(tmp_path: Path) -> None:
    run(POLICIES, tmp_path)


def test_what_the_log_says() -> None:
    packet = bytes([0x45, 0]) + bytes(7) + bytes([6]) + bytes(6) + bytes([192, 0, 2, 7]) + struct.pack(">HH", 5, 443)
    assert decision({9: packet, 10: b"allowed\0", 3: struct.pack(">QQ", 7, 500000)}) == Decision(7.5, True, "tcp", "192.0.2.7", 443)
    assert decision({9: bytes([0x60]) + bytes(39)}).protocol == "ipv6"
    for damaged in (b"", packet[:9], packet[:18], packet[:21], b"\x45" * 19, b"\x15" * 40):
        with pytest.raises(ValueError):
            decision({9: damaged})


def test_what_waits_is_read_in_no_time() -> None:
    if why := provide.possible():
        pytest.skip(f"needs root: {why}")
    ear, helper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with helper, Decisions(own.group("trv60000"), "", ear) as decisions:
        assert decisions.read(0) is None
        for name in (b"one.example", b"two.example"):
            helper.send(b"7.5\trefused\tdns\t\t53\t" + name + b"\tno rule allows this name\t0")
        said = [decisions.read(0) for _ in range(3)]
    assert [one and one.name for one in said] == ["one.example", "two.example", None]


def test_what_the_helper_says() -> None:
    made, unheard = named("7.500000\trefused\tdns\t\t53\tevil.example\tno rule allows this name\t3", 1)
    assert made == Decision(7.5, False, "dns", "", 53, "evil.example", "no rule allows this name") and unheard == 3
    with pytest.raises(ValueError):
        named("7.5\trefused")
