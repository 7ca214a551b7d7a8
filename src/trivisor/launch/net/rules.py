"""What machines may reach, as data. Pure: it can be printed and compared; table.py brings it into the kernel.

Every rule begins at our own interfaces: traffic of the host that has nothing to do with machines meets two comparisons and
nothing else. From a machine:

to the host itself     dropped, whichever of its addresses is meant, unless it was asked for; but for answers to what the host began,
                       and the questions for names that its own relay takes
to other machines      dropped, unless both are on one named network
to metadata services   (unless asked for) and everything else that is no address of a common host: dropped
to the rest            allowed, under the host's address

From elsewhere to a machine nothing but answers is let through: a published port is a socket of the host (relay.py).
Source addresses are checked by the kernel on each interface (rp_filter), IPv6 is off on them; what slips by is dropped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trivisor.launch.net.pool import PREFIX

TABLE = "trivisor"
NETWORKS = "networks"
VERSION = 2
"""Counted up when the rules change: a table of another version is made anew."""

Match = tuple[str, str]
"""What is looked at and what it must be: ("iifname", "trv*"), ("iifname", "!trv*"), ("saddr", "10.0.0.0/8"),
("state", "established,related"), ("nfproto", "ipv6"), ("udp", "53"), ("tcp", "53")."""


@dataclass(frozen=True)
class Rule:
    """One rule of `chain`. `verdict` is accept, drop, masquerade, or "jump CHAIN", or "mark NUMBER", which goes on."""

    chain: str
    matches: tuple[Match, ...]
    verdict: str

    def __str__(self) -> str:
        return f"{self.chain}: {' '.join(f'{what} {value}' for what, value in self.matches)} {self.verdict}"


@dataclass(frozen=True)
class Chain:
    """`hook` is empty for a chain that is only jumped to."""

    name: str
    hook: str = ""
    type: str = "filter"
    priority: int = 0


OURS = f"{PREFIX}*"
NOT_OURS = f"!{PREFIX}*"
ASKED_HOST, ASKED_METADATA = "0x74720001", "0x74720002"
"""Marks that a machine's own table puts on its packets, where it asked for what the rest is denied (own.py)."""
DENIED = (
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local, with the metadata service of most clouds
    "224.0.0.0/4",
    "240.0.0.0/4",
    "100.100.100.200/32",  # metadata of Alibaba's cloud
    "192.0.0.192/32",  # of Oracle's
    "168.63.129.16/32",  # of Azure's
)
CHAINS = (
    Chain("input", "input"),
    Chain("forward", "forward"),
    Chain("out"),
    Chain(NETWORKS),
    Chain("guard"),
    Chain("source", "postrouting", "nat", 100),
    Chain(f"version-{VERSION}"),  # the last to be made: a table that has it is whole
)


def rules(pool: str, *, guarded: Sequence[str]) -> list[Rule]:
    """Return all rules but those of named networks.

    `guarded` are the interfaces between which nothing is to be forwarded: those there were when forwarding was switched
    on for machines on a host that did not forward before.
    """
    ours, answers, ipv6 = ("iifname", OURS), ("state", "established,related"), ("nfproto", "ipv6")
    return [
        Rule("input", (("iifname", NOT_OURS),), "accept"),
        Rule("input", (ipv6,), "drop"),
        Rule("input", (answers,), "accept"),
        Rule("input", (("daddr", pool), ("udp", "53")), "accept"),
        Rule("input", (("daddr", pool), ("tcp", "53")), "accept"),
        Rule("input", (("mark", ASKED_HOST),), "accept"),
        Rule("input", (), "drop"),
        Rule("forward", (ours,), "jump out"),
        Rule("forward", (("oifname", OURS), answers), "accept"),
        Rule("forward", (("oifname", OURS),), "drop"),
        *(Rule("forward", (("iifname", name),), "jump guard") for name in guarded),
        *(Rule("guard", (("oifname", name),), "drop") for name in guarded),
        Rule("out", (ipv6,), "drop"),
        Rule("out", (answers,), "accept"),
        Rule("out", (("daddr", pool),), f"jump {NETWORKS}"),
        Rule("out", (("daddr", pool),), "drop"),
        Rule("out", (("mark", ASKED_METADATA),), "accept"),
        *(Rule("out", (("daddr", denied),), "drop") for denied in DENIED),
        Rule("out", (), "accept"),
        Rule("source", (("nfproto", "ipv4"), ("saddr", pool), ("oifname", NOT_OURS)), "masquerade"),
    ]


def network_rule(subnet: str) -> Rule:
    """Return the rule that lets the machines of a named network reach each other."""
    return Rule(NETWORKS, (("saddr", subnet), ("daddr", subnet)), "accept")
