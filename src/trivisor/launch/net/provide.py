"""A machine's network, as engines ask for it: one call, the same behind every wall.

    with provide(home, place, id, slot, spec, "veth", undo) as net:
        ...  a plan with `netns {net.netns_fd}` or net.outward, or QEMU with `-netdev tap,fd=`; net.processes before the engine's own
        keeper.spawn(..., fds=[..., *net.fds])
        ...  net.steps for the guest

What is made lives as long as its descriptors, which the machine's processes inherit: nothing has to be taken down.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from trivisor.core.errors import HostLacks
from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import Spec
from trivisor.core.undo import Undo
from trivisor.launch.keeper import Process
from trivisor.launch.net import firewall, host, links, networks, own, passt, policy, pool, relay
from trivisor.launch.net.links import INSIDE
from trivisor.launch.net.resolvers import reachable, resolvers
from trivisor.launch.plan import Plan

Kind = Literal["veth", "tap"]
"""veth: a namespace with a configured eth0 (container, gvisor). tap: a descriptor for QEMU, whose guest is configured by steps."""

Step = tuple[str, ...]


@dataclass(frozen=True)
class Net:
    """What a machine's network is made of. The descriptors are closed when the `with` of `provide` ends."""

    netns_fd: int | None = None
    """The namespace to join. None: an empty one is the launcher's to make, or ("host") none at all."""
    tap_fd: int | None = None
    outward: Plan = ()
    """What a plan with a net namespace of its own does in it, after `loopback`, to have an interface."""
    steps: tuple[Step, ...] = ()
    """For a guest that configures itself (PROTOCOL.md, Steps)."""
    dns: tuple[str, ...] = ()
    """Whom the machine asks for names."""
    processes: tuple[Process, ...] = ()
    """Helpers, for the keeper to start before the engine."""
    fds: tuple[int, ...] = ()
    """All descriptors that plans name: those of the helpers, and the two above."""
    facts: dict[str, str] = field(default_factory=dict)
    """For info()."""


def possible() -> str:
    """Return "" if this host gives machines links, else what is missing."""
    return "" if os.geteuid() == 0 else "networks with links of their own need root"


def check(spec: Spec) -> None:
    """Raise HostLacks for a network that cannot be made here, before anything is made."""
    if spec.network in ("none", "host") or not (why := possible()):
        return
    if networks.named(spec.network):
        raise HostLacks(f"{why}, and a named network is made of them", hint='run as root, or use network="nat"')
    if spec.shape or spec.egress is not None or spec.reach:
        hint = "run as root, or leave out shape, egress and reach"
        raise HostLacks(f"{why}, and no other is shaped, has a policy or reaches the host", hint=hint)
    passt.check()


def nat() -> bool:
    """Whether machines can have NAT here."""
    return not possible() or shutil.which("passt") is not None


def details() -> dict[str, str]:
    """Return what there is to say of networks on this host, for doctor."""
    if possible():
        try:
            return {"network": f"nat by {passt.check()}; no named networks: they need root"}
        except HostLacks as error:
            return {"network": f"none only: {error} ({error.hint})"}
    stopped = "; ".join(str(drop) for drop in firewall.drops())
    return {"network": "links of their own, nftables", **({"firewall": stopped} if stopped else {})}


@contextlib.contextmanager
def provide(
    home: Home, place: MachineDir, machine: str, slot: int, spec: Spec, kind: Kind, undo: Undo, *, log: int | None = None
) -> Iterator[Net]:
    """Make the network that `spec` wishes for. `log` takes what the helper says. Raises HostLacks, EngineError."""
    if spec.network in ("none", "host"):
        yield Net(dns=tuple(resolvers()) if spec.network == "host" else (), facts={"network": spec.network})
        return
    check(spec)
    if possible():
        with _unprivileged(machine, spec, log) as net:
            yield net
        return
    with ExitStack() as stack:
        listening = relay.listen(stack, spec.ports, spec.name)
        folder = networks.place(home, spec.network) if networks.named(spec.network) else None
        with host.held(folder) as (chosen, number):
            blocks = pool.blocks(chosen, machine, number)
            link = links.tap(blocks, machine) if kind == "tap" else links.veth(blocks, machine, mac(machine))
        stack.callback(os.close, link.fd)
        servers = resolvers()
        # A machine asks the host's resolvers itself if it can; on a named network its relay knows the names of the others.
        direct = folder is None and bool(servers) and all(reachable(server) for server in servers) and not _ours(servers)
        rules = stack.enter_context(own.keep())
        helper = relay.relay(
            stack,
            place,
            slot,
            link.block,
            listening,
            names=folder,
            upstreams=servers,
            asked=not direct,
            policy=policy.text(spec.egress),
            rules=rules.fileno(),
            log=log,
        )
        if folder is not None:
            undo.add("name", lambda: networks.leave(home, spec.network, spec.name))
            networks.join(home, spec.network, spec.name, link.block.address)
        block = link.block
        dns = tuple(servers) if direct else (block.gateway,)
        if spec.shape or spec.cut or spec.reach or spec.egress is not None:
            own.apply(rules, machine, own.of(home, spec, block.interface, block.address, dns, helper.at))
        address = ("address", INSIDE, block.address, str(block.length), block.gateway)
        yield Net(
            netns_fd=link.fd if kind == "veth" else None,
            tap_fd=link.fd if kind == "tap" else None,
            steps=(("mac", INSIDE, mac(machine)), address, ("dns", *dns)),
            dns=dns,
            processes=(helper.process,),
            fds=(link.fd, *helper.fds),
            facts={
                "network": spec.network,
                "address": block.address,
                "interface": block.interface,
                "dns": " ".join(dns),
                "helper": str(helper.at),
            },
        )


@contextlib.contextmanager
def _unprivileged(machine: str, spec: Spec, log: int | None) -> Iterator[Net]:
    """Make what passt and the machine's plan need to find each other."""
    passt.free(spec.ports, spec.name)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        helper = passt.plan(passt.check(), spec.ports, theirs.fileno(), 2 if log is None else log, uplink=True)
        yield Net(
            outward=passt.outward(ours.fileno(), mac(machine)),
            dns=(passt.DNS,),
            processes=(Process("passt", helper),),
            fds=(ours.fileno(), theirs.fileno()),
            facts={"network": spec.network, "address": passt.ADDRESS},
        )


def settle(spec: Spec) -> None:
    """Return when what `provide` made serves, of a machine that has answered. Raises EngineError."""
    if spec.ports and possible():
        passt.listening(spec.ports, spec.name)


@contextlib.contextmanager
def bare() -> Iterator[Net]:
    """Make a tap that leads nowhere."""
    fd = links.bare_tap()
    try:
        yield Net(tap_fd=fd, fds=(fd,))
    finally:
        os.close(fd)


def mac(machine: str) -> str:
    """Return a machine's hardware address: locally administered, unicast, always the same."""
    return bytes([0x52, 0x54, 0x00, *hashlib.sha256(f"machine {machine}".encode()).digest()[16:19]]).hex(":")


def _ours(servers: list[str]) -> bool:
    """Whether one of them is an address of this host, which machines may not reach."""
    for server in servers:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
            trial.bind((server, 0))  # only an address of the host can be bound
            return True
    return False
