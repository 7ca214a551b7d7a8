"""What holds for one machine alone, and changes while it runs: how it is shaped, and from whom it is cut off.

Rules are a table of the machine's own, which belongs to a netlink socket that its helper holds (relay.py): with the machine's end the
kernel takes the table away, whoever is gone by then. The queues are the interface's, and go with that. Both are replaced whole.

What is dropped is dropped by nftables, both ways; what waits, waits in a queue of the host's end, on its way to the machine: netem
where there is latency (tc-netem(8)), else tbf (tc-tbf(8)). A queue for the other way would need an interface more (ifb), which
would outlive the machine.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence

from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.network import Shape
from trivisor.core.paths import Home
from trivisor.core.spec import Spec
from trivisor.launch.net import netlink, networks, nft
from trivisor.launch.net.netlink import Netlink
from trivisor.launch.net.rules import Chain, Rule

CHAINS = (Chain("from", "prerouting", priority=-150), Chain("to", "postrouting", priority=-150))


@contextlib.contextmanager
def keep() -> Iterator[Netlink]:
    """Open the socket that a machine's table will belong to."""
    with Netlink(netlink.NETFILTER) as kernel:
        yield kernel


def rules(interface: str, shape: Shape, cut: Sequence[str]) -> list[Rule]:
    """Return the rules of one machine. `cut` are the addresses of those it is cut off from."""
    out, into = ("iifname", interface), ("oifname", interface)
    made = []
    for address in cut:
        made += [Rule("from", (out, ("daddr", address)), "drop"), Rule("to", (into, ("saddr", address)), "drop")]
    if shape.loss:
        made += [Rule(chain, (way, ("lost", f"{shape.loss:.6f}")), "drop") for chain, way in (("from", out), ("to", into))]
    if shape.rate_out:
        made.append(Rule("from", (out, ("over", str(shape.rate_out))), "drop"))
    return made


def addresses(home: Home, spec: Spec) -> list[str]:
    """Return where the machines are, now, that a machine is cut off from."""
    found = []
    for name in spec.cut:
        with contextlib.suppress(FileNotFoundError):  # it does not run
            found.append((networks.place(home, spec.network) / name).read_text().strip())
    return found


def apply(kernel: Netlink, machine: str, interface: str, shape: Shape, cut: Sequence[str]) -> None:
    """Have exactly this hold for a machine that runs. Raises HostLacks where the kernel cannot, EngineError if the interface is gone."""
    try:
        index = socket.if_nametoindex(interface)
        with Netlink() as routes:
            _queue(routes, index, shape)
    except OSError as error:
        raise EngineError(f"the interface {interface} cannot be shaped", output=str(error)) from error
    try:
        kernel.batch(nft.replaced(f"trivisor-{machine}", CHAINS, rules(interface, shape, cut)))
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
