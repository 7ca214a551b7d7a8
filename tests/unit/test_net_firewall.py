"""Another firewall that drops what is forwarded: that machines are cut off, that doctor says so, and that the remedy is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from net_support import run

from trivisor.launch.net.firewall import Drop

OTHERS = """
from pyroute2.nftables.main import NFTables
from trivisor.launch.net import firewall, table
from trivisor.launch.net.rules import Rule

def other(family, name, chain, policy):
    with NFTables(nfgen_family=family) as kernel:
        kernel.table("add", name=name)
        kernel.chain("add", table=name, name=chain, hook="forward", type="filter", priority=0, policy=policy)
        kernel.chain("add", table=name, name="DOCKER-USER")

def accept(family, name, chain, *matches):
    expressions = [part for match in matches for part in table._match(match)] + [table._verdict("accept")]
    with NFTables(nfgen_family=family) as kernel:
        kernel.rule("add", table=name, chain=chain, expressions=(expressions,))

def said():
    return [(drop.family, drop.table, drop.chain, drop.docker) for drop in firewall.drops()]

"""


def test_a_chain_that_drops_is_found_until_it_lets_machines_through(tmp_path: Path) -> None:
    code = """
one = machine("one")
reach = lambda timeout=SURE: inside(one.fd, lambda: ask("203.0.113.1", 80, timeout))
assert said() == [] and reach() == "192.0.2.2", (said(), reach())
other(2, "filter", "FORWARD", 0)
assert said() == [("ip", "filter", "FORWARD", True)], said()
assert reach(0.7) == "TimeoutError"
accept(2, "filter", "FORWARD", ("iifname", "trv*"))
accept(2, "filter", "FORWARD", ("oifname", "trv*"), ("state", "established,related"))
assert said() == [] and reach() == "192.0.2.2", (said(), reach())
other(1, "mine", "through", 0)
assert said() == [("inet", "mine", "through", True)], said()
"""
    run(OTHERS + code, tmp_path)


def test_what_does_not_concern_machines_is_not_said(tmp_path: Path) -> None:
    code = """
other(2, "filter", "FORWARD", 1)
other(10, "six", "FORWARD", 0)
with NFTables(nfgen_family=2) as kernel:
    kernel.chain("add", table="filter", name="INPUT", hook="input", type="filter", priority=0, policy=0)
assert said() == [], said()
machine("one")
assert said() == [], said()
"""
    run(OTHERS + code, tmp_path)


def test_the_remedies() -> None:
    assert Drop("ip", "filter", "FORWARD").remedy.startswith("iptables -I FORWARD -i 'trv+' -j ACCEPT; iptables -I FORWARD -o 'trv+' ")
    assert "iptables -I DOCKER-USER -o 'trv+' -m conntrack" in Drop("ip", "filter", "FORWARD", docker=True).remedy
    assert "nft insert rule inet mine through iifname 'trv*' accept" in str(Drop("inet", "mine", "through"))


@pytest.mark.parametrize("drop", [Drop("inet", "mine", "through"), Drop("ip", "filter", "FORWARD")])
def test_the_remedy_works(drop: Drop, tmp_path: Path) -> None:
    program = drop.remedy.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    if program == "iptables" and "nf_tables" not in subprocess.run([program, "-V"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("needs an iptables that speaks nftables")
    code = f"""
one = machine("one")
other({1 if drop.family == "inet" else 2}, {drop.table!r}, {drop.chain!r}, 0)
subprocess.run({drop.remedy!r}, shell=True, check=True)
assert said() == [], said()
assert inside(one.fd, lambda: ask("203.0.113.1", 80, SURE)) == "192.0.2.2"
"""
    run(OTHERS + code, tmp_path)
