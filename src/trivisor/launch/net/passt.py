"""User-mode NAT by passt, a helper process that needs no root and shuts itself in (passt(1), "Security"): for whoever is not root.

A machine has a fixed address of a network that passt makes up; its gateway is not mapped to the host's loopback. passt takes frames:
from QEMU through a socket pair (`plan`), and behind the other walls from an interface of the machine's own namespace, whose other end is a
packet socket (`outward`, guest/src/uplink.c). Since passt before 2024 connects to the host's loopback all the same for a machine that
forges frames, and to the host's other addresses always, `tvinit fence` stands between: none of those, no link-local or metadata
address. It lies outside the machine's namespace, so nothing that a machine's root, or runsc's jail, does to its interface moves it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from trivisor.core.errors import EngineError
from trivisor.core.process import find
from trivisor.launch import jail, tvinit
from trivisor.launch.net.links import INSIDE, uplink_mtu
from trivisor.launch.net.rules import DENIED
from trivisor.launch.plan import Op, Plan

ADDRESS, PREFIX, GATEWAY, DNS = "10.0.2.15", "24", "10.0.2.2", "10.0.2.3"
PASST_FD = 3
_PATIENCE = 10.0
_DENIED = 64
"""As many addresses as the fence takes (fence.h)."""


def check() -> str:
    """Return the path of passt. Raises HostLacks."""
    return find("passt", "passt")


def free(ports: Mapping[int, int], machine: str) -> None:
    """Raise EngineError for a host port that something else listens on: passt would only say so in its log."""
    for host in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", host))
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                why = "is taken" if taken else f"cannot be used: {error.strerror}"
                raise EngineError(
                    f"host port {host} on 127.0.0.1 {why}", machine=machine, hint="publish another port, or end what listens there"
                ) from error


def listening(ports: Mapping[int, int], machine: str) -> None:
    """Return when all these host ports are listened at: passt begins beside the machine, which may be the sooner. Raises EngineError."""
    wanted = {f"0100007F:{port:04X}" for port in ports}
    deadline = time.monotonic() + _PATIENCE
    while wanted:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        wanted -= {row[1] for row in rows if row[3] == "0A"}
        if wanted and time.monotonic() > deadline:
            raise EngineError("passt does not listen on the published ports", machine=machine, hint="see the machine's log")
        time.sleep(0.002 if wanted else 0)  # the kernel tells nobody


def plan(passt: str, ports: Mapping[int, int], fd: int, log: int, *, uplink: bool = False) -> Plan:
    """Return the plan of the helper: `fd` is its end of the pair, `log` takes what it says. `uplink`: frames do not come
    over `fd`, but a socket that they come from."""
    argv = [passt, "--foreground", "--fd", str(PASST_FD), "--quiet", "-4", "--no-map-gw", "--no-dhcp"]
    argv += ["--address", ADDRESS, "--netmask", PREFIX, "--gateway", GATEWAY, "--dns-forward", DNS]
    if uplink:
        argv += ["--mtu", str(uplink_mtu())]
    for host, guest in sorted(ports.items()):
        argv += ["-t", f"127.0.0.1/{host}:{guest}"]
    if not ports:
        argv += ["-t", "none"]
    denied = [*_METADATA, *(address for address in own_addresses() if address not in (GATEWAY, DNS))]
    end = f"uplink:{PASST_FD}" if uplink else str(PASST_FD)
    fence = [str(tvinit.path()), "fence", end, ADDRESS, GATEWAY, *denied[:_DENIED], "--"]
    operations = _contained()
    operations += [("fd", str(fd), str(PASST_FD)), ("fd", str(log), "1"), ("fd", str(log), "2")]
    operations += [("env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"), ("exec", *fence, *argv, "-u", "none")]
    return tuple(operations)


_METADATA = tuple(denied.removesuffix("/32") for denied in DENIED if denied.endswith("/32"))
"""The fence denies the others of DENIED always."""


def _contained() -> list[Op]:
    """Return what makes the fence PID 1 of a namespace: when it has been killed, passt is gone and its ports are free."""
    report = jail.probe()
    if "user" not in report.namespaces:
        return [("namespaces", "pid")] if report.namespaces else []
    maps = [("map-user", os.geteuid()), ("map-group", os.getegid())]
    return [("namespaces", "user", "pid"), *((kind, str(own), str(own), "1") for kind, own in maps)]


def own_addresses() -> list[str]:
    """Return the IPv4 addresses that this host has now, but for the loopback's."""
    try:
        lines = Path("/proc/net/fib_trie").read_text().splitlines()
    except OSError:
        return []
    local = {before.split()[-1] for before, line in pairwise(lines) if line.strip() == "/32 host LOCAL"}
    return sorted(address for address in local if not address.startswith("127."))


def outward(fd: int, mac: str) -> Plan:
    """Return the operations of a machine's plan, after `loopback`, that give it its interface; `fd` is the other end of the helper's."""
    return (("uplink", str(fd), INSIDE, mac, str(uplink_mtu())), ("address", INSIDE, ADDRESS, PREFIX, GATEWAY))


def steps() -> list[tuple[str, ...]]:
    """Return what a guest that configures itself does."""
    return [("address", INSIDE, ADDRESS, PREFIX, GATEWAY), ("dns", DNS)]
