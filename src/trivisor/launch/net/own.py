"""What holds for one machine alone, and changes while it runs: how it is shaped, from whom it is cut off, to whom it may talk.

Rules are a table of the machine's own, which belongs to a netlink socket that its helper holds (relay.py): with the machine's end the
kernel takes the table away, whoever is gone by then. The queues are the interface's, and go with that. Both are replaced whole.

What is dropped is dropped by nftables, both ways; what waits, waits in a queue of the host's end, on its way to the machine: netem
where there is latency (tc-netem(8)), else tbf (tc-tbf(8)). A queue for the other way would need an interface more (ifb), which
would outlive the machine.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.network import DNS, Egress, Reach, Shape, Target
from trivisor.core.paths import Home
from trivisor.core.spec import Spec
from trivisor.launch.net import netlink, networks, nft, policy
from trivisor.launch.net.netlink import Netlink
from trivisor.launch.net.nft import HOSTS, PORTS, Set
from trivisor.launch.net.pool import PREFIX
from trivisor.launch.net.rules import ASKED_HOST, ASKED_METADATA, DENIED, Chain, Rule

DNS_PORT = 53
MEMBERS = 24
"""Bits of the addresses that a named network's members share (pool.subnet)."""

_PLAIN = Shape()

CHAINS = (Chain("from", "prerouting", priority=-150), Chain("to", "postrouting", priority=-150))
NAMING = (
    Chain("redirect", "prerouting", "nat", -100),
    Chain("out"),
    Chain("inward", "input", priority=-10),  # before what holds for all machines (rules.py)
    Chain("onward", "forward", priority=-10),
)
"""What there is besides while a policy names names: what the machine begins goes to its helper, unless a rule allows the address itself."""


@dataclass(frozen=True)
class Helper:
    """Where a machine's helper listens, on the host's end of its link."""

    address: str
    udp: int
    tcp: int
    """Questions for names."""
    gate: int
    """Connections (guest/src/egress_tcp.c)."""

    @classmethod
    def parse(cls, text: str) -> Self:
        address, *ports = text.split()
        return cls(address, *map(int, ports))

    def __str__(self) -> str:
        return f"{self.address} {self.udp} {self.tcp} {self.gate}"

    @property
    def sockets(self) -> tuple[tuple[str, int], ...]:
        return ("udp", self.udp), ("tcp", self.tcp), ("tcp", self.gate)


@contextlib.contextmanager
def keep() -> Iterator[Netlink]:
    """Open the socket that a machine's table will belong to."""
    with Netlink(netlink.NETFILTER) as kernel:
        yield kernel


@dataclass(frozen=True)
class Own:
    """What is to hold for one machine."""

    interface: str
    shape: Shape = _PLAIN
    cut: tuple[str, ...] = ()
    """Addresses of those it is cut off from."""
    egress: Egress | None = None
    reach: tuple[Reach, ...] = ()
    resolvers: tuple[str, ...] = ()
    """Whom it asks for names."""
    members: str = ""
    """The addresses of its named network, which are no egress."""
    helper: Helper | None = None
    """None of a machine that was started before there were names."""

    @property
    def naming(self) -> Helper | None:
        """The helper, if it has to do with this policy."""
        return self.helper if self.egress is not None and self.egress.names else None


def group(interface: str) -> int:
    """Return where the decisions about a machine are logged (NFLOG), while somebody listens (egress.py)."""
    return int(interface.removeprefix(PREFIX)) + 1


def rules(own: Own, *, logged: bool = True) -> list[Rule]:
    """Return the rules of one machine."""
    out, into = ("iifname", own.interface), ("oifname", own.interface)
    made = [Rule("from", (out,), f"mark {ASKED_HOST}")] if "host" in own.reach else []
    if "metadata" in own.reach:
        made += [Rule("from", (out, ("daddr", denied)), f"mark {ASKED_METADATA}") for denied in DENIED]
    for address in own.cut:
        made += [Rule("from", (out, ("daddr", address)), "drop"), Rule("to", (into, ("saddr", address)), "drop")]
    if own.shape.loss:
        made += [Rule(chain, (way, ("lost", f"{own.shape.loss:.6f}")), "drop") for chain, way in (("from", out), ("to", into))]
    if own.shape.rate_out:
        made.append(Rule("from", (out, ("over", str(own.shape.rate_out))), "drop"))
    if own.egress is None:
        return made
    made += _named(own, own.naming) if own.naming else []
    return made + list(_egress(own, logged))


def _named(own: Own, helper: Helper) -> Iterator[Rule]:
    """Yield what sends a machine's questions for names, and its connections, to its helper, and the answers back."""
    out, into = ("iifname", own.interface), ("oifname", own.interface)
    yield Rule("inward", (out,), "jump out")
    yield Rule("onward", (out,), "jump out")
    yield Rule("redirect", (out, ("udp", f"to {DNS_PORT}-{DNS_PORT}")), f"redirect {helper.udp}")
    yield Rule("redirect", (out, ("tcp", f"to {DNS_PORT}-{DNS_PORT}")), f"redirect {helper.tcp}")
    if own.members:
        yield Rule("redirect", (out, ("daddr", own.members)), "accept")
    yield Rule("redirect", (out, ("hosts", "daddr")), "accept")
    yield Rule("redirect", (out, ("ports", "tcp daddr")), "accept")
    yield Rule("redirect", (out, ("tcp", "to 1-65535")), f"redirect {helper.gate}")
    for protocol, port in helper.sockets:
        there = (out, ("daddr", helper.address), (protocol, f"to {port}-{port}"))
        yield Rule("out", there, f"mark {ASKED_HOST}")
        yield Rule("out", there, "accept")
        yield Rule("to", (into, ("saddr", helper.address), (protocol, f"from {port}-{port}")), "accept")


def _egress(own: Own, logged: bool) -> Iterator[Rule]:
    """Yield what lets a machine begin nothing that is not allowed.

    Every packet is looked at, both ways, not only the first of a connection: what is allowed no longer stops at once. What others
    began with the machine passes: the published ports, and its network's members. Where names are allowed, it is looked at after the
    helper's part was sent there.
    """
    out, into, begun = ("iifname", own.interface), ("oifname", own.interface), ("direction", "reply")
    chain = "out" if own.naming else "from"
    yield Rule(chain, (out, begun), "accept")
    yield Rule("to", (into, ("direction", "original")), "accept")
    if own.members:
        yield Rule(chain, (out, ("daddr", own.members)), "accept")
        yield Rule("to", (into, ("saddr", own.members)), "accept")
    noted = f"log {group(own.interface)}"
    for what, protocol in (("hosts", ""), ("ports", "tcp "), ("ports", "udp ")):
        there = (out, (what, f"{protocol}daddr"))
        if logged:
            yield Rule(chain, (*there, ("state", "new")), f"{noted} allowed")
        yield Rule(chain, there, "accept")
        yield Rule("to", (into, (what, f"{protocol}saddr")), "accept")
    if logged:
        yield Rule(chain, (out,), f"{noted} refused")
    yield Rule(chain, (out,), "drop")
    yield Rule("to", (into,), "drop")


def sets(own: Own) -> list[Set]:
    """Return the sets that the rules of one machine look addresses up in."""
    if own.egress is None:
        return []
    targets = list(own.egress.targets)
    if DNS in own.egress.allow and not own.naming:
        targets += [Target(resolver, (DNS_PORT, DNS_PORT)) for resolver in own.resolvers]
    return [Set("hosts", HOSTS, policy.hosts(targets)), Set("ports", PORTS, policy.ports(targets))]


def of(home: Home, spec: Spec, interface: str, address: str, resolvers: Sequence[str], helper: Helper | None) -> Own:
    """Return what is to hold for a machine, as things are now."""
    members = str(ipaddress.IPv4Network((address, MEMBERS), strict=False)) if networks.named(spec.network) else ""
    cut = tuple(addresses(home, spec))
    return Own(interface, spec.shape or Shape(), cut, spec.egress, spec.reach, tuple(resolvers), members, helper)


def addresses(home: Home, spec: Spec) -> list[str]:
    """Return where the machines are, now, that a machine is cut off from."""
    found = []
    for name in spec.cut:
        with contextlib.suppress(FileNotFoundError):  # it does not run
            found.append((networks.place(home, spec.network) / name).read_text().strip())
    return found


def apply(kernel: Netlink, machine: str, own: Own) -> None:
    """Have exactly this hold for a machine that runs. Raises HostLacks where the kernel cannot, EngineError if the interface is gone."""
    try:
        index = socket.if_nametoindex(own.interface)
        with Netlink() as routes:
            _queue(routes, index, own.shape)
    except OSError as error:
        raise EngineError(f"the interface {own.interface} cannot be shaped", output=str(error)) from error
    table = f"trivisor-{machine}"
    if own.egress is not None and own.egress.names and own.helper is None:
        hint = "stop and start it"
        raise HostLacks("this machine was started by a version that knew no policies of names", machine=machine, hint=hint)
    chains = CHAINS + (NAMING if own.naming else ())
    try:
        try:
            kernel.batch(nft.replaced(table, chains, rules(own), sets(own)))
        except FileNotFoundError:  # a kernel that logs nothing (nfnetlink_log) decides all the same
            kernel.batch(nft.replaced(table, chains, rules(own, logged=False), sets(own)))
    except OSError as error:
        hint = "Linux 5.12 or later with nft_numgen, nft_limit and nft_redir"
        raise HostLacks(f"nftables refuses a rule: {error.strerror}", hint=hint) from error


def _queue(routes: Netlink, index: int, shape: Shape) -> None:
    """Set the interface's queue."""
    try:
        if shape.latency:
            routes.ask([netlink.netem(index, round(shape.latency * 1e9), shape.rate_in or 0)])
        elif shape.rate_in:
            routes.ask([netlink.tbf(index, shape.rate_in)])
        else:
            with contextlib.suppress(FileNotFoundError):  # it has none
                routes.ask([netlink.no_queue(index)])
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):
            raise
        kind = "sch_netem" if shape.latency else "sch_tbf"
        raise HostLacks(f"this kernel has no {kind}", hint=f"modprobe {kind}") from error
