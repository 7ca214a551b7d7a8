"""Networks and volumes behind every wall, with the same tests."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import EngineError, Machine, StorageError
from trivisor.launch.net import provide

BOUND = 60.0
SERVE = """\
import socket
server = socket.create_server(("0.0.0.0", 80))
print("ready", flush=True)
while True:
    client, peer = server.accept()
    with client:
        client.sendall(client.recv(100))
"""
CONNECT = """\
import socket, sys, threading
patience, said = float(sys.argv[1]), {}
def connect(place):
    address, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((address, int(port)), timeout=patience) as client:
            client.sendall(b"hello")
            said[place] = client.recv(100).decode()
    except OSError as error:
        said[place] = f"no: {error}"
threads = [threading.Thread(target=connect, args=[place]) for place in sys.argv[2:]]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
for place in sys.argv[2:]:
    print(said[place])
"""


@pytest.fixture
def linked() -> None:
    if why := provide.possible():
        pytest.skip(f"needs root: {why}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def serving(machine: Machine) -> Machine:
    process = machine.spawn(["python3", "-c", SERVE])
    assert process.stdout.readline() == b"ready\n"
    return machine


def tried(machine: Machine, *places: tuple[str, int], patience: float = 20) -> list[str]:
    """What it gets of each place, all tried at once."""
    words = [f"{address}:{port}" for address, port in places]
    return machine.exec(["python3", "-c", CONNECT, str(patience), *words], timeout=BOUND).text.splitlines()


def denied(machine: Machine, *places: tuple[str, int]) -> bool:
    said = tried(machine, *places, patience=1.5)  # what is dropped is not waited for long
    return len(said) == len(places) and all(line.startswith("no:") for line in said)


def own_addresses() -> list[str]:
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    return [word for word in said.split() if "." in word and not word.startswith("127.")]


@pytest.mark.usefixtures("linked")
def test_a_published_port_is_the_machines_and_free_when_it_ends(make: Make) -> None:
    port = free_port()
    machine = serving(make(network="nat", ports={port: 80}))
    with socket.create_connection(("127.0.0.1", port), timeout=BOUND) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
    with pytest.raises(EngineError, match=f"host port {port} on 127.0.0.1 is taken"):
        make(network="nat", ports={port: 80})
    machine.delete(force=True)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.usefixtures("linked")
def test_the_host_and_metadata_are_denied(make: Make) -> None:
    machine = make(network="nat")
    with socket.create_server(("0.0.0.0", 0)) as host, socket.create_server(("127.0.0.1", 0)) as inner:
        port = host.getsockname()[1]
        gateway = machine.exec(["python3", "-c", "print(open('/proc/net/route').read().split()[13])"], timeout=BOUND).text.strip()
        gateway = ".".join(str(byte) for byte in bytes.fromhex(gateway)[::-1])
        places = [(address, port) for address in ("127.0.0.1", gateway, *own_addresses())]
        assert denied(machine, *places, ("127.0.0.1", inner.getsockname()[1]), ("169.254.169.254", 80))
        host.settimeout(0.1)
        with pytest.raises(TimeoutError):
            host.accept()


@pytest.mark.usefixtures("linked")
def test_the_host_is_reached_by_a_machine_that_asked_for_it_and_by_no_other(make: Make) -> None:
    asked, other = make(network="nat", reach="host", egress=["0.0.0.0/0"]), make(network="nat")
    with socket.create_server(("0.0.0.0", 0)) as host:
        threading.Thread(target=lambda: [host.accept()[0].sendall(b"hello"), host.close()], daemon=True).start()
        (address, *_) = [own for own in own_addresses() if not own.startswith("10.213.")]
        port = host.getsockname()[1]
        assert denied(other, (address, port))
        assert tried(asked, (address, port)) == ["hello"]
        assert denied(asked, ("169.254.169.254", 80))


@pytest.mark.usefixtures("linked")
def test_machines_of_a_network_know_each_other_by_name(make: Make) -> None:
    first = make(network="backend", name="first")
    second = serving(make(network="backend", name="second"))  # came later
    alone = make(network="nat", name="alone")
    assert tried(first, ("second", 80), ("second.trivisor", 80)) == ["hello"] * 2
    assert denied(alone, (second.info()["facts"]["address"], 80), ("second", 80))
    second.stop(0)
    assert denied(first, ("second", 80))


def test_without_a_network_there_is_none(make: Make) -> None:
    machine = make()
    names = machine.exec(["ls", "/sys/class/net"], timeout=BOUND).text.split()
    assert set(names) <= {"lo"}
    assert denied(machine, ("192.0.2.1", 80))


def test_volumes(make: Make, tmp_path: Path) -> None:
    shared, readonly = tmp_path / "shared", tmp_path / "readonly"
    for folder in (shared, readonly):
        folder.mkdir()
        (folder / "host").write_text("from the host\n")
    machine = make(volumes={"/data": shared, "/deep/er/ro": f"{readonly}:ro", "/kept": "kept"})
    assert machine.exec("cat /data/host /deep/er/ro/host", timeout=BOUND).text == "from the host\n" * 2
    assert machine.exec("echo from inside > /data/inside; echo kept > /kept/file", timeout=BOUND).exit_code == 0
    assert (shared / "inside").read_text() == "from inside\n"
    refused = machine.exec("echo no > /deep/er/ro/inside", timeout=BOUND)
    assert refused.exit_code != 0 and "ead-only" in refused.error_text
    kinds = {words[1]: words[2] for line in machine.exec(["cat", "/proc/mounts"], check=True).text.splitlines() if (words := line.split())}
    if machine.wall == "vm":
        assert {kinds["/data"], kinds["/deep/er/ro"]} == {"virtiofs"}, "without virtiofsd: test_vm_9p.py"
    (shared / "later").write_text("later\n")
    assert machine.exec("cat /data/later", timeout=BOUND).text == "later\n"
    machine.delete(force=True)
    other = make(volumes={"/v": "kept"})
    assert other.exec("cat /v/file", timeout=BOUND).text == "kept\n"


def test_a_link_in_a_volume_leads_into_the_machine(make: Make, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "secret").write_text("secret")
    (shared / "out").symlink_to(tmp_path / "secret")
    (shared / "up").symlink_to("../secret")
    machine = make(volumes={"/data": shared})
    assert machine.exec("cat /data/out /data/up", timeout=BOUND).exit_code != 0


def test_a_volume_that_became_a_link_is_refused(make: Make, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    machine = make(volumes={"/data": shared})
    machine.stop(0)
    os.rename(shared, tmp_path / "away")
    shared.symlink_to("/etc")
    with pytest.raises(StorageError, match="leads through shared"):
        machine.start()
