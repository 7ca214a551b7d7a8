"""Changing a machine's network: under its lock, written down in its spec, with an event, and in force at once if it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from trivisor.core.errors import InvalidSpec, NotFound, TrivisorError
from trivisor.core.spec import Spec
from trivisor.launch.net import control, netlink, networks, own, policy, provide
from trivisor.launch.net.netlink import Netlink
from trivisor.vmm import life, plugged, reconcile
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vos.network.service import Network, Work
from trivisor.vos.ports import NetworkPort

_IDLE: dict[str, Any] = {"operation": "", "operator": None}


def service(context: Context, machine: str, name: str, row: Callable[[], Row], check: Callable[[str], Row]) -> Network:
    """Return `vm.network` of a machine, of which `row` gives the record, `check` that it is in a state for a verb."""
    return Network(
        name,
        port=lambda: port(context, row()),
        capturing=lambda: port(context, check("capture")),
        change=partial(change, context, machine),
        join=lambda other, whole: join(context, row(), other, whole=whole),
    )


def port(context: Context, row: Row) -> NetworkPort:
    """Return what there is of a machine's network."""
    live = row.state in reconcile.LIVE
    facts = row.facts if live else {}
    return NetworkPort(
        machine=row.id,
        spec=row.spec,
        live=live,
        control=context.folder(row).net,
        interface=facts.get("interface", ""),
        address=facts.get("address", ""),
        why=provide.possible(),
    )


def change(context: Context, machine: str, work: Work) -> None:
    """Have `work` done while nobody else operates the machine."""
    with life.operation(context, machine, "network") as row:
        spec, said = work(port(context, row))
        if spec.egress is not None and plugged.cards(context.folder(row).root):
            hint = "detach it first: the policy would hold for one of them"
            raise InvalidSpec("a machine with a further network card can have no egress policy", machine=row.name, hint=hint)
        row = msgspec.structs.replace(row, spec=spec)
        enforce(context, row)
        context.records.update(row.id, spec=spec, event=("network", said), **_IDLE)


def join(context: Context, row: Row, other: str, *, whole: bool) -> None:
    """Have two machines of one network reach each other, or not: both are told, so whichever starts next knows."""
    rows = [found for found in context.records.find(other) if other in (found.id, found.name)]
    if not rows:
        raise NotFound(f"there is no machine {other}", machine=other, hint="`trivisor ps` lists those there are")
    peer = rows[0]
    for one, two in ((row, peer), (peer, row)):
        change(context, one.id, partial(_cut, other=two.name, where=two.spec.network, whole=whole))


def started(context: Context, row: Row) -> None:
    """A machine of a named network has started: those that are cut off from it, or were from who had its address before, look again."""
    if not networks.named(row.spec.network):
        return
    for other in context.records.rows():
        if other.id != row.id and other.spec.network == row.spec.network and other.spec.cut and other.state in reconcile.LIVE:
            try:
                enforce(context, other)
            except TrivisorError as error:
                context.records.note("network", f"{other.name} cannot be cut off anew: {error}")


def enforce(context: Context, row: Row) -> None:
    """Have the kernel hold to what a running machine's spec says."""
    found = port(context, row)
    if not found.live or not found.interface:
        return
    with Netlink(netlink.NETFILTER, fd=control.rules(found.control, row.name)) as kernel:
        resolvers = row.facts.get("dns", "").split()
        helper = own.Helper.parse(row.facts["helper"]) if "helper" in row.facts else None
        own.apply(kernel, row.id, own.of(context.home, row.spec, found.interface, found.address, resolvers, helper))
    if helper is not None:
        control.policy(found.control, row.name, policy.text(row.spec.egress))


def _cut(port: NetworkPort, *, other: str, where: str, whole: bool) -> tuple[Spec, str]:
    spec = port.spec
    if spec.network in ("none", "host", "nat") or spec.network != where or spec.name == other:
        raise InvalidSpec(f"{spec.name} and {other} are not two machines of one named network", hint="give both the same network")
    cut = set(spec.cut) - {other} if whole else set(spec.cut) | {other}
    said = f"{'joined with' if whole else 'cut off from'} {other}"
    return msgspec.structs.replace(spec, cut=tuple(sorted(cut))), said
