"""Whether another firewall of this host would stop what machines send: doctor says so, and what to do.

nftables lets no table overrule a drop of another, so what our own table accepts is dropped all the same where a forward chain of
another has the policy drop, as Docker and ufw make it, and no rule that names our interfaces. To accept there what comes from our
interfaces is safe: what machines may reach is our own table's affair, and stays so.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trivisor.launch.net import netlink
from trivisor.launch.net.netlink import Netlink, attributes
from trivisor.launch.net.pool import PREFIX
from trivisor.launch.net.rules import TABLE

_FAMILIES = {1: "inet", 2: "ip"}
_TABLE, _NAME, _HOOK, _POLICY = 1, 3, 4, 5
_HOOK_NUMBER = 1
_FORWARD, _DROP = 2, 0
_LEGACY = Path("/proc/net/ip_tables_names")
_BY_IPTABLES = ("filter", "FORWARD")
_DOCKERS = "DOCKER-USER"
"""The chain that Docker leaves to others."""
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Drop:
    """A chain that drops what machines send."""

    family: str
    table: str
    chain: str
    docker: bool = False

    @property
    def remedy(self) -> str:
        if (self.table, self.chain) == _BY_IPTABLES and self.family == "ip":
            into = f"iptables -I {_DOCKERS if self.docker else self.chain}"
            return f"{into} -i '{PREFIX}+' -j ACCEPT; {into} -o '{PREFIX}+' -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
        into = f"nft insert rule {self.family} {self.table} {self.chain}"
        return f"{into} iifname '{PREFIX}*' accept; {into} oifname '{PREFIX}*' ct state established,related accept"

    def __str__(self) -> str:
        chain = f"the chain {self.chain} of the table {self.family} {self.table}"
        return f"{chain} drops what machines send beyond the host; remedy: {self.remedy}"


def drops() -> list[Drop]:
    """Return the chains that would drop it. Needs root; empty where nothing can be read. Takes a millisecond or two."""
    try:
        with Netlink(netlink.NETFILTER) as kernel:
            chains = [(family, attributes(data)) for family, data in kernel.dump(netlink.GETCHAIN)]
        with Netlink(netlink.NETFILTER) as kernel:
            rules = [(family, data) for family, data in kernel.dump(netlink.GETRULE)]
    except OSError:  # this kernel has no nftables, or they are not ours to read
        return list(_legacy())
    names = {(family, _text(chain[_TABLE]), _text(chain[_NAME])) for family, chain in chains}
    excepted = {(family, _text(attributes(data)[_TABLE])) for family, data in rules if _names_ours(data)}
    found = []
    for family, chain in chains:
        table = _text(chain[_TABLE])
        if family in _FAMILIES and table != TABLE and _drops_forwarded(chain) and (family, table) not in excepted:
            found.append(Drop(_FAMILIES[family], table, _text(chain[_NAME]), (family, table, _DOCKERS) in names))
    return [*found, *_legacy()]


def _drops_forwarded(chain: dict[int, bytes]) -> bool:
    hook = attributes(chain.get(_HOOK, b"")).get(_HOOK_NUMBER)
    policy = chain.get(_POLICY)
    return hook is not None and policy is not None and (_number(hook), _number(policy)) == (_FORWARD, _DROP)


def _names_ours(rule: bytes) -> bool:
    """Whether a rule speaks of our interfaces: the name is in it as it is, whoever wrote it."""
    return PREFIX.encode() in rule


def _legacy() -> Iterator[Drop]:
    """The tables of an iptables from before nftables, which netlink does not show."""
    program = shutil.which("iptables-legacy-save") or shutil.which("iptables-save")
    try:
        if program is None or "filter" not in _LEGACY.read_text().split():
            return
        said = subprocess.run([program, "-t", "filter"], capture_output=True, text=True, timeout=_TIMEOUT, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    if ":FORWARD DROP" in said and f" {PREFIX}+" not in said:
        yield Drop("ip", *_BY_IPTABLES, f":{_DOCKERS} " in said)


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
