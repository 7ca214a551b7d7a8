"""trivisor device, network, and memory of one machine: words into wishes, on machines that need no wall for it."""

from __future__ import annotations

import pytest
from cli_support import Cli
from machine_home import IMAGE

from trivisor.cli.verbs.device import _MAKERS, _OPTIONS
from trivisor.cli.verbs.memory_view import hexdump
from trivisor.core.devices import KINDS, Disk, NetworkCard, SharedFolder


@pytest.fixture
def made(cli: Cli) -> str:
    """The name of a machine that does not run; its policy gives it a network."""
    assert cli("create", "--name", "net", "--egress", "dns", "--shape", "rate-in=1M", IMAGE).status == 0
    return "net"


def test_what_is_wished_of_a_network(cli: Cli, made: str) -> None:
    (one,) = cli("network", "ls", "--json", made).json
    assert (one["network"], one["egress"], one["shape"]["rate_in"]) == ("nat", {"allow": ["dns"]}, 1 << 20)
    assert cli("network", "egress", made).out == "dns\n"
    assert cli("network", "egress", made, "Example.org:443", "192.0.2.0/24").out == "example.org:443 192.0.2.0/24\n"
    assert cli("network", "egress", made, "none").out == "none\n"
    assert cli("network", "egress", made, "--json").json == {"allow": []}
    assert cli("network", "egress", made, "all").out == "all\n"
    assert cli("network", "shape", made, "rate-out=2M").out == "rate-out=2M\n"
    assert cli("network", "shape", made).out == "rate-out=2M\n"
    assert cli("network", "shape", made, "none").out == "none\n"
    assert cli("network").out.splitlines()[1].split() == [made, "nat", "-", "-", "-", "all", "-"]


def test_ports_for_the_next_start(cli: Cli, made: str) -> None:
    free = int(cli("network", "publish", made, "80").out)
    assert cli("network", "--json").json[0]["ports"] == {str(free): 80}
    assert cli("network", "withdraw", made, str(free)).status == 0
    again = cli("network", "withdraw", made, str(free))
    assert again.status == 125 and "hint: published are: none" in again.err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("network shape net loss=much", 2, "not a number"),
        ("network shape net speed=1", 125, "a shape has no speed"),
        ("network shape net fast", 2, "not KEY=VALUE"),
        ("network egress net all none", 125, "hint: such as"),
        ("network publish net 80:x", 2, "not HOST:GUEST"),
        ("network decisions net", 125, "hint:"),
        ("network capture net /nowhere", 125, "hint:"),
        ("network cut net other", 125, "other"),
        ("device attach net disk", 2, "told what it is made of"),
        ("device attach net disk x --mac 1", 2, "disk has no --mac"),
        ("device attach net random x", 2, "made of nothing"),
        ("device attach net folder x", 2, "not SOURCE:PATH"),
        ("device attach net floppy x", 2, "floppy"),
        ("device attach net hostusb x", 125, "hint: for example"),
        ("device attach net hostpci x", 125, "hint: for example"),
        ("device attach net watchdog bite", 125, "not 'bite'"),
        ("memory read net 0x10 -p 1 --physical", 2, "not both"),
        ("memory read net 0x10 lots", 125, "not a size"),
        ("memory write net 0x10 xy", 2, "hexadecimal"),
        ("memory search net ( --regex", 2, "no regular expression"),
        ("memory search net 0 --regex --hex", 2, "not both"),
        ("memory balloon net 1M", 125, "hint:"),
        ("memory stats net", 125, "hint:"),
    ],
)
def test_what_cannot_be(cli: Cli, made: str, words: str, status: int, message: str) -> None:
    done = cli(*words.split())
    assert (done.status, message in done.err) == (status, True), done


def test_what_a_device_is_made_of() -> None:
    assert set(_MAKERS) == set(KINDS) and set(_OPTIONS) < set(KINDS)
    assert _MAKERS["disk"]("/a.qcow2", {"bus": "nvme", "readonly": True}) == Disk("/a.qcow2", bus="nvme", readonly=True)
    assert _MAKERS["folder"]("/a:b:/mnt:ro", {}) == SharedFolder("/a:b", "/mnt", readonly=True)
    assert _MAKERS["network"](None, {}) == NetworkCard("nat")


def test_devices_of_the_host(cli: Cli) -> None:
    assert cli("device", "host").out.startswith("USB:")
    assert set(cli("device", "host", "--json").json) == {"usb", "pci"}


def test_bytes_as_lines() -> None:
    first, second = hexdump(0x1000, bytes(range(0x3C, 0x4E)))
    assert first == "0000000000001000  3c 3d 3e 3f 40 41 42 43  44 45 46 47 48 49 4a 4b  |<=>?@ABCDEFGHIJK|"
    assert second == f"0000000000001010  {'4c 4d':<48}  |LM|"
