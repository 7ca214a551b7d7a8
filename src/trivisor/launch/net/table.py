"""rules.py into nftables, through pyroute2: one table, `inet trivisor`.

pyroute2's interface to nftables makes one change at a time, so the table is whole only when its last chain is there; until then no
machine has a link. See docs/decisions/ for why not nft(8).
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.expressions import genex
from pyroute2.nftables.main import NFTables

from trivisor.core.errors import HostLacks
from trivisor.launch.net.rules import CHAINS, TABLE, Chain, Match, Rule

_INET = 1
_REGISTER = 1
_VERDICT_REGISTER = 0
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META = {"mark": 3, "iifname": 6, "oifname": 7, "nfproto": 15, "l4proto": 16}
_CT_STATE = 0
_EQUAL, _UNEQUAL = 0, 1
_CODES = {"drop": 0, "accept": 1, "jump": -3}
"""Of linux/netfilter/nf_tables.h, and of netfilter.h: pyroute2 wants the numbers."""
_IPV4_SOURCE, _IPV4_DESTINATION, _PORT = 12, 16, 2
_STATES = {"established": 2, "related": 4}
"""Bits of ct state (enum ip_conntrack_info, linux/netfilter/nf_conntrack_common.h)."""
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_FAMILIES = {"ipv4": 2, "ipv6": 10}

Expression = dict[str, Any]


def make(rules: Sequence[Rule]) -> None:
    """Make the table anew. Raises HostLacks where the kernel cannot."""
    remove()
    with NFTables(nfgen_family=_INET) as kernel:
        try:
            kernel.table("add", name=TABLE)
            for chain in CHAINS[:-1]:
                _chain(kernel, chain)
            for rule in rules:
                _rule(kernel, rule)
            _chain(kernel, CHAINS[-1])
        except NetlinkError as error:
            raise HostLacks(f"nftables refuses a rule: {error}", hint="modprobe nf_tables nft_ct nft_masq") from error


def add(rule: Rule) -> None:
    """Add one rule to its chain."""
    with NFTables(nfgen_family=_INET) as kernel:
        _rule(kernel, rule)


def remove() -> None:
    """Remove the table; that there is none is no error."""
    with NFTables(nfgen_family=_INET) as kernel:
        if any(table.get_attr("NFTA_TABLE_NAME") == TABLE for table in kernel.get_tables()):
            kernel.table("del", name=TABLE)


def _chain(kernel: NFTables, chain: Chain) -> None:
    if chain.hook:
        kernel.chain("add", table=TABLE, name=chain.name, hook=chain.hook, type=chain.type, priority=chain.priority, policy=1)
    else:
        kernel.chain("add", table=TABLE, name=chain.name)


def _rule(kernel: NFTables, rule: Rule) -> None:
    expressions = [*(part for match in rule.matches for part in _match(match)), _verdict(rule.verdict)]
    kernel.rule("add", table=TABLE, chain=rule.chain, expressions=(expressions,))


def _match(match: Match) -> Iterator[Expression]:
    what, value = match
    if what in ("iifname", "oifname"):
        unlike, name = value.startswith("!"), value.removeprefix("!")
        # A name is compared with its end, 16 bytes in all; one with a star up to the star.
        data = name[:-1].encode() if name.endswith("*") else name.encode().ljust(16, b"\0")
        yield _expression("meta", key=_META[what], dreg=_REGISTER)
        yield _compare(data, unlike=unlike)
    elif what in ("saddr", "daddr"):
        network = ipaddress.IPv4Network(value)
        yield _expression("payload", dreg=_REGISTER, base=_NETWORK_HEADER, offset=_place(what), len=4)
        if network.prefixlen < 32:
            yield _expression("bitwise", sreg=_REGISTER, dreg=_REGISTER, len=4, mask=_value(network.netmask.packed), xor=_value(bytes(4)))
        yield _compare(network.network_address.packed)
    elif what == "state":
        bits = sum(_STATES[state] for state in value.split(","))
        yield _expression("ct", dreg=_REGISTER, key=_CT_STATE)
        mask = bits.to_bytes(4, "little")
        yield _expression("bitwise", sreg=_REGISTER, dreg=_REGISTER, len=4, mask=_value(mask), xor=_value(bytes(4)))
        yield _compare(bytes(4), unlike=True)
    elif what == "mark":
        yield _expression("meta", key=_META[what], dreg=_REGISTER)
        yield _compare(int(value, 0).to_bytes(4, sys.byteorder))
    elif what == "nfproto":
        yield _expression("meta", key=_META[what], dreg=_REGISTER)
        yield _compare(bytes([_FAMILIES[value]]))
    else:
        yield _expression("meta", key=_META["l4proto"], dreg=_REGISTER)
        yield _compare(bytes([_PROTOCOLS[what]]))
        yield _expression("payload", dreg=_REGISTER, base=_TRANSPORT_HEADER, offset=_PORT, len=2)
        yield _compare(int(value).to_bytes(2, "big"))


def _place(what: str) -> int:
    return _IPV4_SOURCE if what == "saddr" else _IPV4_DESTINATION


def _verdict(verdict: str) -> Expression:
    if verdict == "masquerade":
        return _expression("masq")
    word, _, chain = verdict.partition(" ")
    attributes: list[tuple[str, object]] = [("NFTA_VERDICT_CODE", _CODES[word])]
    if chain:
        attributes.append(("NFTA_VERDICT_CHAIN", chain))
    return _expression("immediate", dreg=_VERDICT_REGISTER, data={"attrs": [("NFTA_DATA_VERDICT", {"attrs": attributes})]})


def _compare(data: bytes, *, unlike: bool = False) -> Expression:
    return _expression("cmp", sreg=_REGISTER, op=_UNEQUAL if unlike else _EQUAL, data=_value(data))


def _value(data: bytes) -> Expression:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def _expression(name: str, **attributes: object) -> Expression:
    made: Expression = genex(name, attributes)
    return made
