"""Addresses, rules and resolvers: what is decided without a kernel."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from trivisor.core.paths import Home
from trivisor.launch.net import networks, pool, rules
from trivisor.launch.net.resolvers import reachable, resolvers

POOL = pool.CANDIDATES[0]


def test_a_block_is_four_addresses_with_a_name() -> None:
    block = pool.Block(POOL, 5)
    assert (block.interface, block.gateway, block.address, block.length) == ("trv5", "10.213.0.21", "10.213.0.22", 30)
    assert len(pool.Block(POOL, 16383).interface) < 16
    assert pool.Block(POOL, 16383).address == "10.213.255.254"


def test_machines_of_no_network_and_of_each_network_never_share_a_block() -> None:
    single = {block.number for block in pool.blocks(POOL, "a", None)}
    assert single == set(range(pool.SINGLE))
    first, last = ({block.number for block in pool.blocks(POOL, "a", number)} for number in (0, pool.NETWORKS - 1))
    assert len(first) == len(last) == pool.MEMBERS
    assert not first & single and not first & last and max(last) == 16383


def test_a_machine_tries_blocks_from_its_own_place_on() -> None:
    assert next(pool.blocks(POOL, "a", None)) == next(pool.blocks(POOL, "a", None))
    assert len({next(pool.blocks(POOL, str(number), None)).number for number in range(50)}) > 40


@pytest.mark.parametrize("number", [0, 1, pool.NETWORKS - 1])
def test_the_subnet_of_a_network_is_its_members_addresses(number: int) -> None:
    subnet = ipaddress.IPv4Network(pool.subnet(POOL, number))
    found = [ipaddress.IPv4Address(block.address) for block in pool.blocks(POOL, "a", number)]
    assert all(address in subnet for address in found) and len(found) == pool.MEMBERS


def test_the_pool_is_one_that_the_host_has_no_route_into() -> None:
    assert pool.choose([]) == POOL
    assert pool.choose(["0.0.0.0/0", "192.168.0.0/16"]) == POOL  # the way out leads everywhere, and is no obstacle
    assert pool.choose(["10.213.7.0/24"]) == pool.CANDIDATES[1]
    assert pool.choose(["10.0.0.0/8"]) is None


def test_every_rule_begins_at_our_interfaces() -> None:
    made = rules.rules(POOL, guarded=["eth0", "eth1"])
    for chain in rules.CHAINS:
        if chain.hook and chain.name != "source":
            first = next(rule for rule in made if rule.chain == chain.name)
            assert first.matches[0] in (("iifname", "!trv*"), ("iifname", "trv*"))
    assert [str(rule) for rule in made if rule.chain == "source"] == [
        "source: nfproto ipv4 saddr 10.213.0.0/16 oifname !trv* masquerade",
    ]
    # What is not ours is touched only between interfaces that were there when forwarding was off.
    assert [str(rule) for rule in made if rule.chain == "guard"] == ["guard: oifname eth0 drop", "guard: oifname eth1 drop"]
    assert not [rule for rule in rules.rules(POOL, guarded=[]) if "guard" in str(rule)]


def test_what_a_machine_sends_to_the_host_ends_in_a_drop() -> None:
    to_host = [rule for rule in rules.rules(POOL, guarded=[]) if rule.chain == "input"]
    assert to_host[-1] == rules.Rule("input", (), "drop")
    accepted = [str(rule) for rule in to_host[1:] if rule.verdict == "accept"]
    assert accepted == [
        "input: state established,related accept",
        "input: daddr 10.213.0.0/16 udp 53 accept",
        "input: daddr 10.213.0.0/16 tcp 53 accept",
        "input: mark 0x74720001 accept",
    ]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.53", "169.254.169.254", "100.100.100.200", "168.63.129.16", "224.0.0.1"])
def test_denied_addresses(address: str) -> None:
    assert not reachable(address)


def test_resolvers_far_ones_first(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("# a comment\nnameserver 127.0.0.53\nnameserver fe80::1\nnameserver\noptions x\n")
    assert resolvers((stub, real)) == ["127.0.0.53"]
    real.write_text("nameserver 9.9.9.9\nnameserver 1.1.1.1\nnameserver 9.9.9.9\nnameserver 8.8.8.8\nnameserver 8.8.4.4\n")
    assert resolvers((stub, real)) == ["9.9.9.9", "1.1.1.1", "8.8.8.8"]
    assert resolvers((tmp_path / "none",)) == []


def test_members_of_a_network(tmp_path: Path) -> None:
    home = Home(tmp_path)
    networks.join(home, "back", "web", "10.0.0.1")
    networks.join(home, "back", "web", "10.0.0.2")
    networks.join(home, "other", "db", "10.0.0.3")
    assert (home.networks / "back/web").read_text() == "10.0.0.2\n"
    assert (home.networks / "back").stat().st_mode & 0o777 == 0o755
    assert networks.sweep(home, lambda: {"back": {"web"}, "other": {"db"}}) == []
    assert len(networks.sweep(home, lambda: {"back": set()})) == 2
    assert [entry.name for entry in home.networks.iterdir()] == ["back"] and not list((home.networks / "back").iterdir())
    networks.leave(home, "back", "web")  # is not known any more
    networks.leave(home, "nat", "web")
