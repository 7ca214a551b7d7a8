"""Addresses. The pool is one /16 of the host; each machine has a /30 of it: the host's end and the machine's.

A block is taken by making its interface, `trvN`: the kernel lets only one be made, whichever home and process wants it, and a
machine that ends frees it with its link. Nothing is written down, so nothing can be wrong.

The lower half of the pool is for machines on their own ("nat"), each cut off from all others. The upper half is 128 named networks of
64 machines.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PREFIX = "trv"
SINGLE = 8192
NETWORKS = 128
MEMBERS = 64
CANDIDATES = tuple(f"10.{number}.0.0/16" for number in (213, 217, 221, 229, 233, 239, 199, 187))


@dataclass(frozen=True)
class Block:
    """Four addresses of `pool`, of which two are used."""

    pool: str
    number: int

    @property
    def interface(self) -> str:
        """The name of the host's end."""
        return f"{PREFIX}{self.number}"

    @property
    def gateway(self) -> str:
        return self._address(1)

    @property
    def address(self) -> str:
        return self._address(2)

    @property
    def length(self) -> int:
        """Of the network's part of an address, in bits."""
        return 30

    def _address(self, offset: int) -> str:
        return str(ipaddress.IPv4Network(self.pool)[4 * self.number + offset])


def blocks(pool: str, machine: str, network: int | None) -> Iterator[Block]:
    """Yield the blocks that a machine may have, in the order in which it tries them: from one that follows from its id on."""
    first, size = (0, SINGLE) if network is None else (SINGLE + network * MEMBERS, MEMBERS)
    start = int.from_bytes(hashlib.sha256(machine.encode()).digest()[:8], "big")
    for step in range(size):
        yield Block(pool, first + (start + step) % size)


def subnet(pool: str, network: int) -> str:
    """Return the addresses of a named network."""
    base = ipaddress.IPv4Network(pool)
    return str(ipaddress.IPv4Network((int(base[0]) + 4 * (SINGLE + network * MEMBERS), 24)))


def choose(routes: Iterable[str]) -> str | None:
    """Return the first pool that no route of the host leads into; None if all are taken."""
    known = [ipaddress.IPv4Network(route) for route in routes]
    for candidate in CANDIDATES:
        if not any(route.prefixlen and route.overlaps(ipaddress.IPv4Network(candidate)) for route in known):
            return candidate
    return None
