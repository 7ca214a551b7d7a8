"""Whom the host asks for names (resolv.conf(5)), and whether a machine can ask them itself."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from trivisor.launch.net.rules import DENIED

MAX = 3
_PLACES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


def resolvers(places: tuple[Path, ...] = _PLACES) -> list[str]:
    """Return the IPv4 addresses of the host's resolvers: those that are not on its loopback if there are any."""
    found: list[str] = []
    for place in places:
        try:
            lines = place.read_text(errors="replace").splitlines()
        except OSError:
            continue
        servers = [words[1] for line in lines if (words := line.split())[:1] == ["nameserver"] and len(words) > 1]
        found = [*dict.fromkeys([*found, *filter(_ipv4, servers)])]
    far = [server for server in found if reachable(server)]
    return (far or found)[:MAX]


def reachable(server: str) -> bool:
    """Whether machines may send to it. (An address of the host itself they may not either: the relay asks for them.)"""
    address = ipaddress.IPv4Address(server)
    return not any(address in ipaddress.IPv4Network(denied) for denied in DENIED)


def _ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
