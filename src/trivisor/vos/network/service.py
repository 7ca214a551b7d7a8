"""`vm.network`: how one machine is connected, while it runs and for its next start.

What is changed is written down with the machine's spec, and holds at once if it runs: the helper under its keeper has the ports
(launch/net/relay.py), the kernel the rest (launch/net/own.py), so it goes on when this process has ended. Captures are this process's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.errors import AlreadyExists, HostLacks, InvalidSpec, NotFound
from trivisor.core.network import Egress, Shape, egress, shape
from trivisor.core.spec import Spec
from trivisor.launch.net import control, own, relay
from trivisor.vos.network.capture import SNAPLEN, Capture
from trivisor.vos.network.decisions import Decisions
from trivisor.vos.ports import NetworkPort

_HEARD = 1 << 20
"""Bytes of decisions that may wait to be read."""

Work = Callable[[NetworkPort], tuple[Spec, str]]
"""Do what is to be done at once, and return the spec as it is from now on, with what to say of it."""
Change = Callable[[Work], None]
"""Have it done while nobody else changes the machine, and written down."""


class Network:
    """The network of one machine."""

    def __init__(
        self,
        machine: str,
        port: Callable[[], NetworkPort],
        capturing: Callable[[], NetworkPort],
        change: Change,
        join: Callable[[str, bool], None],
    ) -> None:
        self._machine = machine
        self._port = port
        self._capturing = capturing
        self._change = change
        self._join = join

    @property
    def name(self) -> str:
        """none, nat, host, or the name of a network of the home."""
        return self._port().spec.network

    @property
    def address(self) -> str:
        """The machine's own; "" while it does not run, and without a network."""
        return self._port().address

    @property
    def ports(self) -> dict[int, int]:
        """Published ports, host to guest."""
        return dict(self._port().spec.ports)

    @property
    def shape(self) -> Shape:
        """Rates, latency and loss."""
        return self._port().spec.shape or Shape()

    @property
    def cut_off(self) -> tuple[str, ...]:
        """The machines of its network that it is cut off from."""
        return self._port().spec.cut

    def publish(self, guest_port: int, host_port: int = 0) -> int:
        """Have connections to `host_port` of this host's loopback (0: a free one) go to `guest_port` in the machine.

        Returns the host's port. Unlike forward, it lasts beyond this process, and a stop and a start. Raises InvalidSpec,
        AlreadyExists if it is published already, EngineError if the port is taken, HostLacks without root.
        """
        for port, least in ((guest_port, 1), (host_port, 0)):
            if isinstance(port, bool) or not isinstance(port, int) or not least <= port <= 65535:
                raise InvalidSpec(f"port {port!r} is not {least} to 65535")
        made = []

        def work(port: NetworkPort) -> tuple[Spec, str]:
            self._linked(port)
            if host_port in port.spec.ports:
                to = port.spec.ports[host_port]
                raise AlreadyExists(f"host port {host_port} leads to port {to} already", machine=self._machine, hint="withdraw it first")
            with relay.listener(host_port, self._machine) as listener:
                made.append(int(listener.getsockname()[1]))
                if port.live:
                    control.publish(port.control, self._machine, listener, port.address, guest_port)
            ports = {**port.spec.ports, made[0]: guest_port}
            return msgspec.structs.replace(port.spec, ports=ports), f"host port {made[0]} leads to port {guest_port}"

        self._change(work)
        return made[0]

    def withdraw(self, host_port: int) -> None:
        """Have a published port of the host be free again; connections through it end. Raises NotFound, HostLacks."""

        def work(port: NetworkPort) -> tuple[Spec, str]:
            if host_port not in port.spec.ports:
                known = ", ".join(map(str, sorted(port.spec.ports))) or "none"
                raise NotFound(f"host port {host_port} is not published", machine=self._machine, hint=f"published are: {known}")
            if port.live:
                self._linked(port)
                control.withdraw(port.control, self._machine, host_port)
            ports = {host: guest for host, guest in port.spec.ports.items() if host != host_port}
            return msgspec.structs.replace(port.spec, ports=ports), f"host port {host_port} is withdrawn"

        self._change(work)

    def reshape(self, **how: Any) -> None:
        """Connect it so well, and no better: rate_in and rate_out (bytes a second, or "1M"), latency (seconds, or "50ms"), loss (0 to 1).

        What is not given is as it is without a shape; without arguments, all of it (core/network.py says more). Raises InvalidSpec,
        HostLacks without root, or where the kernel lacks what is asked for.
        """
        wanted = shape(how)

        def work(port: NetworkPort) -> tuple[Spec, str]:
            self._linked(port)
            return msgspec.structs.replace(port.spec, shape=wanted or None), _said(wanted)

        self._change(work)

    @property
    def egress(self) -> Egress | None:
        """What it may begin to talk to; None: all that its network lets it."""
        return self._port().spec.egress

    def restrict(self, *allowed: str) -> None:
        """Have it begin nothing but what is `allowed`.

        "dns"; addresses with or without ports, such as "192.0.2.0/24:443"; names, such as "pypi.example", "*.example.org:443", of servers
        that speak TLS or HTTP, or "git.example.org:22/tcp" of any others (docs/network.md). Nothing given, nothing is allowed. Holds at
        once, for connections under way, too, which stall, or end if they were made by name. Raises InvalidSpec, HostLacks.
        """
        if not all(isinstance(line, str) for line in allowed):
            raise InvalidSpec(f"egress is given line by line, not as {allowed!r}", hint='restrict("dns", "192.0.2.0/24:443")')
        policy = egress(allowed)

        def work(port: NetworkPort) -> tuple[Spec, str]:
            self._linked(port)
            said = f"may talk to {', '.join(policy.allow) or 'nobody'}"
            return msgspec.structs.replace(port.spec, egress=policy), said

        self._change(work)

    def unrestrict(self) -> None:
        """Have it talk to all that its network lets it. Raises InvalidSpec, HostLacks."""

        def work(port: NetworkPort) -> tuple[Spec, str]:
            self._linked(port)
            return msgspec.structs.replace(port.spec, egress=None), "may talk to whom it likes"

        self._change(work)

    def decisions(self) -> Decisions:
        """Return an iterator over what its egress policy decides from now on: each thing begun, each packet refused.

        One process at a time may have it. Raises InvalidState unless it runs or is paused, Busy, HostLacks.
        """
        port = self._capturing()
        self._linked(port)
        ear, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _HEARD)
            try:
                control.decisions(port.control, self._machine, theirs)
                return Decisions(own.group(port.interface), self._machine, ear)
            except BaseException:
                ear.close()
                raise

    def cut(self, other: str) -> None:
        """Have this machine and `other`, of one named network, reach each other no longer; connections under way stall.

        Raises InvalidSpec unless they are on one network, NotFound.
        """
        self._join(other, False)

    def join(self, other: str) -> None:
        """Have them reach each other again. Raises NotFound."""
        self._join(other, True)

    def capture(self, path: str | os.PathLike[str], *, snaplen: int = SNAPLEN, most: int | None = None) -> Capture:
        """Write what it sends and gets to a pcap file, until the Capture is closed, the machine ends, or this process does.

        `snaplen`: bytes kept of each packet. `most`: the file's bytes at most. Raises InvalidState, HostLacks without root, StorageError.
        """
        port = self._capturing()
        self._linked(port)
        return Capture(port.interface, Path(os.fspath(path)), snaplen=snaplen, most=most, machine=self._machine)

    def _linked(self, port: NetworkPort) -> None:
        """Raise unless it has a link of its own, or will have."""
        if port.spec.network in ("none", "host"):
            what = "it has no network" if port.spec.network == "none" else "it has the host's network as it is"
            raise InvalidSpec(f"{self._machine}: {what}", machine=self._machine, hint='make one with network="nat"')
        if port.why or (port.live and not port.interface):
            why = port.why or "its network is not a link of its own"
            raise HostLacks(why, machine=self._machine, hint="run as root; forward needs no network")


def _said(wanted: Shape) -> str:
    parts = []
    if wanted.rate_in:
        parts.append(f"gets {wanted.rate_in} B/s")
    if wanted.rate_out:
        parts.append(f"sends {wanted.rate_out} B/s")
    if wanted.latency:
        parts.append(f"waits {wanted.latency:g} s")
    if wanted.loss:
        parts.append(f"loses {wanted.loss:.4g} of all packets")
    return ", ".join(parts) or "as it is"
