"""An egress policy as the kernel and the machine's helper take it. Pure.

Addresses go into sets of nftables, which are looked up in a few steps however many there are; such a set takes no two elements that
overlap, so what is allowed is cut into pieces that do not. Names go to the helper, as text (guest/src/egress.c).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from itertools import pairwise

from trivisor.core.network import Egress, Target

Piece = tuple[int, int, int, int]
"""The first address and the last, the first port (or protocol) and the last."""

_PROTOCOLS = (0, 255)


def hosts(targets: Iterable[Target]) -> list[Piece]:
    """Return the addresses that are allowed with every protocol."""
    found = ipaddress.collapse_addresses(ipaddress.IPv4Network(target.network) for target in targets if target.ports is None)
    return [(int(network[0]), int(network[-1]), *_PROTOCOLS) for network in found]


def ports(targets: Iterable[Target]) -> list[Piece]:
    """Return the addresses that are allowed with some ports, and those."""
    spans = [(ipaddress.IPv4Network(target.network), target.ports) for target in targets if target.ports is not None]
    edges = sorted({int(network[0]) for network, _ in spans} | {int(network[-1]) + 1 for network, _ in spans})
    made: list[Piece] = []
    before: list[tuple[int, int]] = []
    for start, end in pairwise(edges):
        here = _merged(allowed for network, allowed in spans if int(network[0]) <= start <= int(network[-1]))
        if here and here == before and made[-1][1] == start - 1:
            made[-len(here) :] = [(piece[0], end - 1, *piece[2:]) for piece in made[-len(here) :]]
        else:
            made += [(start, end - 1, *span) for span in here]
        before = here
    return made


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges of ports that do not overlap or touch."""
    made: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if made and first <= made[-1][1] + 1:
            made[-1] = (made[-1][0], max(made[-1][1], last))
        else:
            made.append((first, last))
    return made


def text(egress: Egress | None) -> str:
    """Return what the helper is told."""
    if egress is None:
        return "open\n"
    names = (f"name {name.name} {name.ports[0]} {name.ports[1]} {'plain' if name.plain else 'seen'}\n" for name in egress.names)
    addresses = (f"address {target.network.replace('/', ' ')}\n" for target in egress.targets)
    return "".join(["closed\n", *names, *addresses])
