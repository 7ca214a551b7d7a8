"""Devices as values, where they are met on the host, and what is written down of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from trivisor.core.devices import KINDS, Disk, NetworkCard, Random, SerialSocket, Served, SharedFolder, Value, Watchdog, kind_of
from trivisor.core.errors import AlreadyExists, InvalidSpec, StorageError
from trivisor.launch.net.cards import Card
from trivisor.vmm import plugged
from trivisor.vmm.plugged import Link
from trivisor.vos.devices import endpoint

VALUES: list[Value] = [
    Disk("/x.qcow2", readonly=True, iops=5, bandwidth="1M", bus="nvme"),
    Random(),
    SerialSocket("/x"),
    NetworkCard("blue", "52-54-00-AA-bb-cc"),
    SharedFolder("/x", "//a//b/"),
    Watchdog("pause"),
]


def test_values_are_put_in_one_form() -> None:
    assert NetworkCard("blue", "52-54-00-AA-bb-cc").mac == "52:54:00:aa:bb:cc"
    assert SharedFolder("x", "//a//b/") == SharedFolder(Path.cwd() / "x", "/a/b")
    assert [kind_of(value) for value in VALUES] == ["disk", "random", "serial", "network", "folder", "watchdog"]
    assert set(KINDS) >= {kind_of(value) for value in VALUES}
    with pytest.raises(InvalidSpec):
        Watchdog("bite")  # type: ignore[arg-type]
    with pytest.raises(InvalidSpec):
        SerialSocket("a\0b")


def test_what_is_written_down_is_read_again(tmp_path: Path) -> None:
    entries = {f"d{number}": plugged.entry(value) for number, value in enumerate(VALUES)}
    entries["d3"] = plugged.entry(VALUES[3], Link("trv1", "10.0.0.2", "blue"))
    entries["ours"] = plugged.entry(Served("serial"))
    plugged.write(tmp_path, entries)
    again = plugged.read(tmp_path)
    assert again == entries
    assert [entry.device for entry in again.values()] == [*VALUES, Served("serial")]
    assert [entry.kept for entry in again.values()] == [True] * 6 + [False]
    assert plugged.links(tmp_path) == [Link("trv1", "10.0.0.2", "blue")]
    (tmp_path / "devices.json").write_text('{"a": {"watchdog": {"action": "bite"}}}')
    with pytest.raises(StorageError, match="cannot be read"):
        plugged.read(tmp_path)
    assert plugged.links(tmp_path) == []


def test_a_socket_whose_listener_is_gone_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / ("long" * 30) / "port")
    Path(path).parent.mkdir()
    with endpoint.listen(path), pytest.raises(AlreadyExists):
        endpoint.listen(path)
    with endpoint.listen(path):
        at = os.open(Path(path).parent, os.O_PATH)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(f"/proc/self/fd/{at}/port")
        os.close(at)
    endpoint.remove(path)
    with endpoint.listen(path):
        endpoint.forget(path)
        assert Path(path).is_socket(), "somebody listens"
    endpoint.forget(path)
    assert not Path(path).exists()
    Path(path).write_text("a file")
    with pytest.raises(AlreadyExists):
        endpoint.listen(path)
    endpoint.remove(path)
    endpoint.forget(path)
    assert Path(path).read_text() == "a file", "what is no socket is left alone"
    with pytest.raises(StorageError):
        endpoint.listen(str(tmp_path / "none" / "port"))


def test_what_a_guest_is_told_of_a_card() -> None:
    """It is the way to its own network, and to the rest only where there is no other way."""
    named = Card(-1, "blue", "trv8214", "10.213.128.90", "10.213.128.89", 30)
    address = ("address", "eth1", "10.213.128.90", "30")
    route = ("route", "eth1", "10.213.128.0", "24", "10.213.128.89")
    assert named.steps("eth1", alone=False) == [address, route]
    assert named.steps("eth1", alone=True) == [(*address, "10.213.128.89"), route]
    nat = Card(-1, "nat", "trv1", "10.213.0.6", "10.213.0.5", 30)
    assert nat.steps("eth1", alone=False) == [("address", "eth1", "10.213.0.6", "30")]
    assert nat.steps("eth1", alone=True)[0] == ("address", "eth1", "10.213.0.6", "30", "10.213.0.5")
