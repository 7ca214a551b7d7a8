"""Links and rules on a real kernel: what machines reach, and what is left when they are gone."""

from __future__ import annotations

from pathlib import Path

from net_support import run


def test_what_a_machine_reaches(tmp_path: Path) -> None:
    code = """
serve("0.0.0.0", 22)
with Netlink() as here:
    here.ask([netlink.address(1, "198.51.100.7", 32)])
one, two = machine("one"), machine("two")
serve_in_two = inside(two.fd, lambda: serve("0.0.0.0", 80))
def look():
    return {
        "internet": ask("203.0.113.1", 80, SURE),
        "loopback": ask("127.0.0.1", 22, SURE),
        "gateway": ask(one.block.gateway, 22),
        "address": ask("192.0.2.2", 22),
        "other address": ask("198.51.100.7", 22),
        "metadata": ask("169.254.169.254", 80),
        "metadata 2": ask("100.100.100.200", 80),
        "other machine": ask(two.block.address, 80),
        "other gateway": ask(two.block.gateway, 22),
    }
found = inside(one.fd, look)
assert found.pop("internet") == "192.0.2.2", found  # under the host's address
assert found.pop("loopback") == "ConnectionRefusedError"  # its own
assert set(found.values()) == {"TimeoutError"}, found
# The host reaches it; others behind the host do not.
assert ask(two.block.address, 80, SURE) == two.block.gateway
def from_away():
    with Netlink() as there:
        index = socket.if_nametoindex("eth0")
        there.ask([netlink.default_route(index, "192.0.2.2")])
    return ask(two.block.address, 80)
assert inside(away, from_away) == "TimeoutError"
"""
    run(code, tmp_path)


def test_a_machine_cannot_pretend_to_be_another(tmp_path: Path) -> None:
    code = """
one = machine("one")
def pretend():
    with Netlink() as there:
        there.ask([netlink.address(2, "192.0.2.77", 32)])
    with socket.socket() as client:
        client.settimeout(0.7)
        client.bind(("192.0.2.77", 0))
        try:
            client.connect(("203.0.113.1", 80))
            return "connected"
        except TimeoutError:
            return "dropped"
assert inside(one.fd, pretend) == "dropped"
assert inside(one.fd, lambda: ask("203.0.113.1", 80, SURE)) == "192.0.2.2"
"""
    run(code, tmp_path)


def test_members_of_a_named_network_reach_each_other_and_no_others(tmp_path: Path) -> None:
    code = """
a, b = host.network(Path("/tmp")), host.network(Path("/usr"))
assert a != b and host.network(Path("/tmp")) == a
one, two, other, single = machine("one", a), machine("two", a), machine("other", b), machine("single")
for link in (two, other, single):
    inside(link.fd, lambda: serve("0.0.0.0", 80))
assert inside(one.fd, lambda: ask(two.block.address, 80, SURE)) == one.block.address
assert inside(one.fd, lambda: ask(other.block.address, 80)) == "TimeoutError"
assert inside(one.fd, lambda: ask(single.block.address, 80)) == "TimeoutError"
assert inside(single.fd, lambda: ask(two.block.address, 80)) == "TimeoutError"
assert inside(one.fd, lambda: ask("203.0.113.1", 80, SURE)) == "192.0.2.2"
"""
    run(code, tmp_path)


def test_nothing_is_left(tmp_path: Path) -> None:
    code = """
forward = Path("/proc/sys/net/ipv4/ip_forward")
forward.write_text("0")
before = socket.if_nameindex()
one, tap = machine("one"), links.tap(pool.blocks(host.ready(), "tap", None), "tap")
assert {one.block.interface, tap.block.interface} <= {name for _, name in socket.if_nameindex()}
assert Path(f"/sys/class/net/{one.block.interface}/ifalias").read_text() == "one\\n"
assert forward.read_text() == "1\\n"
assert not host.sweep()  # they are in use
os.close(one.fd)
os.close(tap.fd)
deadline = time.monotonic() + 60
while socket.if_nameindex() != before and time.monotonic() < deadline:  # the kernel takes namespaces down in its own time
    time.sleep(0.01)
assert socket.if_nameindex() == before
assert host.sweep() and not host.sweep()
assert forward.read_text() == "0\\n"
assert sorted(os.listdir("/run/trivisor")) == ["lock"]
machine("again")
assert forward.read_text() == "1\\n"
"""
    run(code, tmp_path)


def test_a_sweep_comes_before_a_link_or_sees_it(tmp_path: Path) -> None:
    code = """
given, said = host.network, []
def swept_after(place):
    number, host.network = given(place), given
    assert host.sweep()
    return number
host.network = swept_after
with host.held(Path("/tmp")) as (chosen, number):
    assert host._whole() and (host.RUN / "allowed" / str(number)).exists()
    sweeper = threading.Thread(target=lambda: said.append(host.sweep()))
    sweeper.start()
    sweeper.join(0.2)
    assert not said  # it waits
    link = links.veth(pool.blocks(chosen, "one", number), "one", "52:54:00:00:00:01")
sweeper.join(20)
assert said == [False] and host._whole()
"""
    run(code, tmp_path)


def test_a_flushed_table_is_made_again_before_the_next_link(tmp_path: Path) -> None:
    code = """
from trivisor.launch.net import table
number = host.network(Path("/tmp"))
one, two = machine("one", number), machine("two", number)
inside(two.fd, lambda: serve("0.0.0.0", 80))
serve("0.0.0.0", 22)
table.remove()
assert inside(one.fd, lambda: ask(one.block.gateway, 22, SURE)) != "TimeoutError"
machine("three")
assert inside(one.fd, lambda: ask(one.block.gateway, 22)) == "TimeoutError"
assert inside(one.fd, lambda: ask(two.block.address, 80, SURE)) == one.block.address
"""
    run(code, tmp_path)


def test_a_host_that_did_not_forward_still_does_not_for_others(tmp_path: Path) -> None:
    code = """
Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
# A second interface of the host, with a computer behind it.
behind = links.loopback()
with Netlink() as here:
    here.ask([netlink.new_veth(60, "lan0", "02:00:00:00:00:03", 1400, peer="eth0", peer_namespace=behind)])
    here.ask([netlink.address(60, "198.51.100.1", 24), netlink.up(60)])
def build():
    with Netlink() as there:
        index = socket.if_nametoindex("eth0")
        there.ask([netlink.address(index, "198.51.100.2", 24), netlink.up(index), netlink.default_route(index, "198.51.100.1")])
inside(behind, build)
def route_back():
    with Netlink() as there:
        there.ask([netlink.default_route(socket.if_nametoindex("eth0"), "192.0.2.2")])
inside(away, route_back)
assert inside(behind, lambda: ask("203.0.113.1", 80)) == "TimeoutError"
one = machine("one")
assert inside(one.fd, lambda: ask("203.0.113.1", 80, SURE)) == "192.0.2.2"
assert inside(behind, lambda: ask("203.0.113.1", 80)) == "TimeoutError"
"""
    run(code, tmp_path)


def test_two_machines_with_one_id_get_two_blocks(tmp_path: Path) -> None:
    code = """
links_made = [machine("same") for _ in range(5)] + [links.tap(pool.blocks(host.ready(), "same", None), "same")]
assert len({link.block for link in links_made}) == 6
"""
    run(code, tmp_path)
