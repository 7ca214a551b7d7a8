"""rules.py's rules as nftables takes them, in messages of our own (linux/netfilter/nf_tables.h): for tables that change while machines run.

table.py does the same through pyroute2 for the table that is made once; here a table is replaced whole, in one transaction, so at no moment
do fewer rules hold than before or after.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trivisor.launch.net.netlink import Message, attribute, text
from trivisor.launch.net.policy import Piece
from trivisor.launch.net.rules import Chain, Match, Rule

OWNED = 2
"""NFT_TABLE_F_OWNER: the table goes with the socket that it was made through (Linux 5.12)."""
_INET = 1
_SUBSYSTEM = 10 << 8
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = _SUBSYSTEM, _SUBSYSTEM | 2, _SUBSYSTEM | 3, _SUBSYSTEM | 6
_NEWSET, _NEWELEMENTS = _SUBSYSTEM | 9, _SUBSYSTEM | 12
_CREATE, _APPEND = 0x400, 0x800
_NESTED = 0x8000
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_META = {"iifname": 6, "oifname": 7, "nfproto": 15, "l4proto": 16}
_EQUAL, _UNEQUAL, _LESS, _AT_MOST, _AT_LEAST = 0, 1, 2, 3, 5
_MARK = 3
_CODES = {"drop": 0, "accept": 1, "jump": -3}
_REGISTER = 1
_WORDS = 8
"""NFT_REG32_00: the first of the registers of four bytes, which keys of several parts are put into."""
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_CT_STATE, _CT_DIRECTION, _NEW, _REPLY = 0, 1, 8, 1
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_PORT = {"from": 0, "to": 2}
_ADDRESS = {"saddr": 12, "daddr": 16}
_RANDOM = 1
_HOST_TO_NET = 1
_LIMIT_BYTES, _LIMIT_OVER = 1, 1
_SECOND = 1
_BURST = 128 << 10
"""Bytes: a packet on a link between namespaces has up to 64 KiB, and would never pass a smaller one."""
_LOGGED = 64
"""Bytes of a packet that are logged: its headers."""
_PARTS = 1_000_000
_INTERVALS = 0x80 | 0x4 | 0x2
"""Flags of a set: keys of several parts, ranges of each, never changed."""
_ELEMENTS = 500
"""Of a set, in a message: an attribute has 64 KiB at most."""
_IPV4_TYPE = 7
"""nft(8)'s number of what the first part of a key is; HOSTS and PORTS have those of the second. The kernel does not look at it."""


@dataclass(frozen=True)
class Set:
    """Addresses, and ports or protocols: a rule looks an address and one of those up in it at once."""

    name: str
    width: int
    """Bytes of the second part: HOSTS (protocols) or PORTS."""
    pieces: Sequence[Piece]


HOSTS, PORTS = 1, 2
_SECOND_TYPE = {HOSTS: 12, PORTS: 13}


def replaced(table: str, chains: Sequence[Chain], rules: Sequence[Rule], sets: Sequence[Set] = ()) -> list[Message]:
    """Return what makes an owned table hold these, and nothing else, whether it is there or not; with no rules it goes."""
    name = text(1, table)
    there = _header() + name + _number(2, OWNED)
    messages: list[Message] = [(_NEWTABLE, _CREATE, there), (_DELTABLE, 0, _header() + name)]
    if rules:
        messages.append((_NEWTABLE, _CREATE, there))
        for number, one in enumerate(sets, 1):
            messages.append((_NEWSET, _CREATE, _header() + name + _set(one, number)))
            for start in range(0, len(one.pieces), _ELEMENTS):
                elements = b"".join(_element(piece, one.width) for piece in one.pieces[start : start + _ELEMENTS])
                body = _header() + name + text(2, one.name) + attribute(3 | _NESTED, elements) + _number(4, number)
                messages.append((_NEWELEMENTS, _CREATE, body))
        messages += [(_NEWCHAIN, _CREATE, _header() + name + _chain(chain)) for chain in chains]
        messages += [(_NEWRULE, _CREATE | _APPEND, _header() + name + _rule(rule)) for rule in rules]
    return messages


def _set(one: Set, number: int) -> bytes:
    key = _number(4, _IPV4_TYPE << 6 | _SECOND_TYPE[one.width]) + _number(5, 8)
    fields = b"".join(attribute(1 | _NESTED, _number(1, width)) for width in (4, one.width))
    return text(2, one.name) + _number(3, _INTERVALS) + key + attribute(9 | _NESTED, attribute(2 | _NESTED, fields)) + _number(10, number)


def _element(piece: Piece, width: int) -> bytes:
    start, end, first, last = piece
    key, key_end = (
        address.to_bytes(4, "big") + second.to_bytes(width, "big").ljust(4, b"\0") for address, second in ((start, first), (end, last))
    )
    return attribute(1 | _NESTED, attribute(1 | _NESTED, _value(key)) + attribute(10 | _NESTED, _value(key_end)))


def _chain(chain: Chain) -> bytes:
    made = text(3, chain.name)
    if chain.hook:
        hook = _number(1, _HOOKS[chain.hook]) + attribute(2, struct.pack(">i", chain.priority))
        made += attribute(4 | _NESTED, hook) + _number(5, _CODES["accept"]) + text(7, chain.type)
    return made


def _rule(rule: Rule) -> bytes:
    parts = [*(part for match in rule.matches for part in _match(match)), *_verdict(rule.verdict)]
    return text(2, rule.chain) + attribute(4 | _NESTED, b"".join(attribute(1 | _NESTED, part) for part in parts))


def _match(match: Match) -> Iterator[bytes]:
    what, value = match
    if what in ("iifname", "oifname"):
        # A name is compared with its end, 16 bytes in all.
        yield _meta(_META[what])
        yield _compare(value.encode().ljust(16, b"\0"))
    elif what in _ADDRESS:
        network = ipaddress.IPv4Network(value)
        yield _meta(_META["nfproto"])
        yield _compare(bytes([socket.AF_INET]))
        yield _payload(_NETWORK_HEADER, _ADDRESS[what], 4)
        yield _masked(network.netmask.packed)
        yield _compare(network.network_address.packed)
    elif what in _PROTOCOLS:  # "to 80-90", "from 53-53"
        side, _, ports = value.partition(" ")
        first, _, last = ports.partition("-")
        yield _meta(_META["l4proto"])
        yield _compare(bytes([_PROTOCOLS[what]]))
        yield _payload(_TRANSPORT_HEADER, _PORT[side], 2)
        yield _compare(int(first).to_bytes(2, "big"), _AT_LEAST)
        yield _compare(int(last).to_bytes(2, "big"), _AT_MOST)
    elif what in ("hosts", "ports"):  # "daddr" or "saddr", after the protocol of the ports: looked up in the set of this name
        protocol, _, side = value.rpartition(" ")
        yield _meta(_META["nfproto"])
        yield _compare(bytes([socket.AF_INET]))
        if protocol:
            yield _meta(_META["l4proto"])
            yield _compare(bytes([_PROTOCOLS[protocol]]))
        yield _payload(_NETWORK_HEADER, _ADDRESS[side], 4, _WORDS)
        if protocol:
            yield _payload(_TRANSPORT_HEADER, _PORT["to" if side == "daddr" else "from"], 2, _WORDS + 1)
        else:
            yield _expression("meta", _number(1, _WORDS + 1) + _number(2, _META["l4proto"]))
        yield _expression("lookup", text(1, what) + _number(2, _WORDS))
    elif what == "direction":
        yield _expression("ct", _number(1, _REGISTER) + _number(2, _CT_DIRECTION))
        yield _compare(bytes([_REPLY]), _EQUAL if value == "reply" else _UNEQUAL)
    elif what == "state":
        yield _expression("ct", _number(1, _REGISTER) + _number(2, _CT_STATE))
        yield _masked(struct.pack("=I", _NEW))
        yield _compare(bytes(4), _UNEQUAL)
    elif what == "lost":
        yield _expression("numgen", _number(1, _REGISTER) + _number(2, _PARTS) + _number(3, _RANDOM))
        order = _number(1, _REGISTER) + _number(2, _REGISTER) + _number(3, _HOST_TO_NET) + _number(4, 4) + _number(5, 4)
        yield _expression("byteorder", order)
        yield _compare(struct.pack(">I", round(float(value) * _PARTS)), _LESS)
    elif what == "over":
        rate = int(value)
        wide = attribute(1, struct.pack(">Q", rate)) + attribute(2, struct.pack(">Q", _SECOND))
        burst = min(max(rate // 10, _BURST), (1 << 32) - 1)
        yield _expression("limit", wide + _number(3, burst) + _number(4, _LIMIT_BYTES) + _number(5, _LIMIT_OVER))
    else:
        raise ValueError(what)


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, _REGISTER) + _number(2, key))


def _payload(base: int, offset: int, length: int, register: int = _REGISTER) -> bytes:
    return _expression("payload", _number(1, register) + _number(2, base) + _number(3, offset) + _number(4, length))


def _masked(mask: bytes) -> bytes:
    made = attribute(4 | _NESTED, _value(mask)) + attribute(5 | _NESTED, _value(bytes(4)))
    return _expression("bitwise", _number(1, _REGISTER) + _number(2, _REGISTER) + _number(3, 4) + made)


def _compare(data: bytes, how: int = _EQUAL) -> bytes:
    return _expression("cmp", _number(1, _REGISTER) + _number(2, how) + attribute(3 | _NESTED, _value(data)))


def _verdict(verdict: str) -> tuple[bytes, ...]:
    word, _, rest = verdict.partition(" ")
    if word == "log":  # GROUP PREFIX
        group, _, prefix = rest.partition(" ")
        said = attribute(1, struct.pack(">H", int(group))) + text(2, prefix) + _number(3, _LOGGED) + attribute(4, struct.pack(">H", 1))
        return (_expression("log", said),)
    if word == "mark":
        register = _expression("immediate", _number(1, _REGISTER) + attribute(2 | _NESTED, _value(struct.pack("=I", int(rest, 0)))))
        return register, _expression("meta", _number(2, _MARK) + _number(3, _REGISTER))
    if word == "redirect":  # to a port of the interface's own address
        register = _expression("immediate", _number(1, _REGISTER) + attribute(2 | _NESTED, _value(int(rest).to_bytes(2, "big"))))
        return register, _expression("redir", _number(1, _REGISTER))
    said = attribute(1, struct.pack(">i", _CODES[word])) + (text(2, rest) if rest else b"")
    code = attribute(2 | _NESTED, said)
    return (_expression("immediate", _number(1, 0) + attribute(2 | _NESTED, code)),)


def _expression(name: str, data: bytes) -> bytes:
    return text(1, name) + attribute(2 | _NESTED, data)


def _value(data: bytes) -> bytes:
    return attribute(1, data)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _header() -> bytes:
    return struct.pack(">BBH", _INET, 0, 0)
