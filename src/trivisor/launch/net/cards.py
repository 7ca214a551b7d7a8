"""Network cards that come while a machine runs: a tap as a machine's first one is, and what its guest is told.

The interface goes with the descriptor that QEMU holds. There is no helper behind it (relay.py): no ports are published on it, and it
answers no names; a machine that has no network else is told the host's resolvers, if it can reach those.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home
from trivisor.launch.net import host, links, networks, own, pool, provide
from trivisor.launch.net.resolvers import reachable, resolvers

Step = tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """A card's link, and its descriptor."""

    fd: int
    network: str
    interface: str
    address: str
    gateway: str
    length: int

    def steps(self, interface: str, *, alone: bool) -> list[Step]:
        """Return what the guest is told; `alone`: it has no other network."""
        gateway = [self.gateway] if alone else []
        made: list[Step] = [("address", interface, self.address, str(self.length), *gateway)]
        if networks.named(self.network):
            members = ipaddress.IPv4Network((self.address, own.MEMBERS), strict=False)
            made.append(("route", interface, str(members.network_address), str(own.MEMBERS), self.gateway))
        servers = [server for server in resolvers() if reachable(server)] if alone and not networks.named(self.network) else []
        return [*made, ("dns", *servers)] if servers else made


def check() -> None:
    """Raise HostLacks where cards cannot be made."""
    if why := provide.possible():
        raise HostLacks(f"{why}, and a network card is plugged into one", hint="run as root")


@contextmanager
def make(home: Home, card: str, network: str) -> Iterator[Card]:
    """Make a card's link; `card` is what follows from which its address is. Raises HostLacks, EngineError."""
    check()
    with host.held(networks.place(home, network) if networks.named(network) else None) as (chosen, number):
        link = links.tap(pool.blocks(chosen, card, number), card.split(maxsplit=1)[0])
    try:
        block = link.block
        yield Card(link.fd, network, block.interface, block.address, block.gateway, block.length)
    finally:
        os.close(link.fd)
