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

from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.network import DNS, Egress, Reach, Shape, Target
from trivisor.core.paths import Home
from trivisor.core.spec import Spec
from trivisor.launch.net import netlink, networks, nft
from trivisor.launch.net.netlink import Netlink
from trivisor.launch.net.pool import PREFIX
from trivisor.launch.net.rules import ASKED_HOST, ASKED_METADATA, DENIED, Chain, Rule

MEMBERS = 24
"""Bits of the addresses that a named network's members share (pool.subnet)."""

_PLAIN = Shape()

CHAINS = (Chain("from", "prerouting", priority=-150), Chain("to", "postrouting", priority=-150))


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
    return made + list(_egress(own, own.egress, logged)) if own.egress is not None else made


def _egress(own: Own, policy: Egress, logged: bool) -> Iterator[Rule]:
    """Yield what lets a machine begin nothing that is not allowed.

    Every packet is looked at, both ways, not only the first of a connection: what is allowed no longer stops at once. What others
    began with the machine passes: the published ports, and its network's members.
    """
    out, into, begun = ("iifname", own.interface), ("oifname", own.interface), ("direction", "reply")
    yield Rule("from", (out, begun), "accept")
    yield Rule("to", (into, ("direction", "original")), "accept")
    if own.members:
        yield Rule("from", (out, ("daddr", own.members)), "accept")
        yield Rule("to", (into, ("saddr", own.members)), "accept")
    noted = f"log {group(own.interface)}"
    for target in _targets(own, policy):
        for protocol in ("tcp", "udp") if target.ports else ("",):
            there, back = [("daddr", target.network)], [("saddr", target.network)]
            if target.ports:
                span = f"{target.ports[0]}-{target.ports[1]}"
                there.append((protocol, f"to {span}"))
                back.append((protocol, f"from {span}"))
            if logged:
                yield Rule("from", (out, *there, ("state", "new")), f"{noted} allowed")
            yield Rule("from", (out, *there), "accept")
            yield Rule("to", (into, *back), "accept")
    if logged:
        yield Rule("from", (out,), f"{noted} refused")
    yield Rule("from", (out,), "drop")
    yield Rule("to", (into,), "drop")


def _targets(own: Own, policy: Egress) -> Iterator[Target]:
    for line in policy.allow:
        if line == DNS:
            yield from (Target(resolver, (53, 53)) for resolver in own.resolvers)
        else:
            yield Target.parse(line)


def of(home: Home, spec: Spec, interface: str, address: str, resolvers: Sequence[str]) -> Own:
    """Return what is to hold for a machine, as things are now."""
    members = str(ipaddress.IPv4Network((address, MEMBERS), strict=False)) if networks.named(spec.network) else ""
    cut = tuple(addresses(home, spec))
    return Own(interface, spec.shape or Shape(), cut, spec.egress, spec.reach, tuple(resolvers), members)


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
    try:
        try:
            kernel.batch(nft.replaced(table, CHAINS, rules(own)))
        except FileNotFoundError:  # a kernel that logs nothing (nfnetlink_log) decides all the same
            kernel.batch(nft.replaced(table, CHAINS, rules(own, logged=False)))
    except OSError as error:
        hint = "Linux 5.12 or later with nft_numgen and nft_limit"
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
