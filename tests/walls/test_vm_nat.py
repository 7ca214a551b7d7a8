"""The network of real machines: none, and user-mode NAT with published ports; what it denies is what docs/security.md says."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host_state import processes
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, EngineError, HostLacks, InvalidSpec, Machine, State
from trivisor.core.paths import MachineDir
from trivisor.launch.net import pool, provide
from trivisor.vmm.engines.vm import proc

BOUND = 60.0
CONNECT = """\
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3] if sys.argv[3:] else 1.5)) as client:
        print(client.recv(100).decode())
except OSError as error:
    print("no:", error)
"""
SERVE = """\
import socket
server = socket.create_server(("0.0.0.0", 80))
print("ready", flush=True)
while True:
    with server.accept()[0] as client:
        client.sendall(b"guest " + client.recv(100))
"""
ELSEWHERE = f"trivisor-test-{os.getpid()}"
BEYOND = """\
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
server.accept()[0].sendall(b"beyond")
"""
FORGE = Path(__file__).with_name("forge_frame.py").read_text()

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt")


@pytest.fixture(scope="module", autouse=True)
def passt_only() -> Iterator[None]:
    """As where there is no root: machines have no links of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provide, "possible", lambda: "networks with links of their own need root")
        yield


@pytest.fixture(scope="module")
def nat(wall_home: VmHome) -> Iterator[Machine]:
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("debian", wall="vm", network="nat", ports={free_port(): 80})
        machine.start()
        yield machine
        machine.delete(force=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def own_addresses() -> list[str]:
    """The host's IPv4 addresses but the loopback's, and those of machines' networks, which come and go with other tests."""
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    apart = [ipaddress.ip_network(network) for network in ("127.0.0.0/8", *pool.CANDIDATES)]
    return [word for word in said.split() if "." in word and not any(ipaddress.ip_address(word) in network for network in apart)]


@contextmanager
def host_service(address: str) -> Iterator[tuple[int, list[str]]]:
    """A server on the host: its port, and who has come."""
    came: list[str] = []
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            try:
                while True:
                    client, peer = server.accept()
                    came.append(peer[0])
                    with client:
                        client.sendall(b"host")
            except OSError:
                return  # closed

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], came
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def elsewhere() -> Iterator[str]:
    """A network namespace joined to ours by a veth; its address."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip(8), to make another host")
    subprocess.run(["ip", "netns", "add", ELSEWHERE], check=True)
    try:
        for command in (
            # Not the names of tests/beyond.py: the kernel takes a deleted namespace's interfaces down in its own time.
            f"ip link add tvelse0 type veth peer name tvelse1 netns {ELSEWHERE}",
            "ip addr add 198.51.100.1/30 dev tvelse0",
            "ip link set tvelse0 up",
            f"ip -n {ELSEWHERE} addr add 198.51.100.2/30 dev tvelse1",
            f"ip -n {ELSEWHERE} link set tvelse1 up",
        ):
            subprocess.run(command.split(), check=True)
        yield "198.51.100.2"
    finally:
        subprocess.run(["ip", "netns", "delete", ELSEWHERE], check=True)


@contextmanager
def serving(machine: Machine) -> Iterator[None]:
    with machine.spawn(["python3", "-c", SERVE]) as server:
        assert server.stdout.readline(timeout=BOUND) == b"ready\n", server.stderr.read()
        yield


def ask(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=BOUND) as client:
        client.sendall(b"hello")
        return client.recv(100)


def test_none_is_none(running: Machine) -> None:
    assert [entry.name for entry in running.files.list("/sys/class/net")] == ["lo"]
    assert "Network is unreachable" in running.exec(["python3", "-c", CONNECT, "192.0.2.1", "80"], timeout=BOUND).text


@needs_passt
def test_a_published_port_reaches_the_guest_from_the_host_alone(nat: Machine) -> None:
    (port,) = nat.spec.ports
    with serving(nat):
        assert ask("127.0.0.1", port) == b"guest hello"
        assert ask("127.0.0.1", port) == b"guest hello"
        for address in own_addresses():
            with pytest.raises(ConnectionRefusedError):
                ask(address, port)


@needs_passt
def test_the_hosts_loopback_is_out_of_reach(nat: Machine) -> None:
    with host_service("127.0.0.1") as (port, came):
        for address in ("127.0.0.1", "10.0.2.2", "10.0.2.3", "10.0.2.15", *own_addresses()):
            assert nat.exec(["python3", "-c", CONNECT, address, str(port)], timeout=BOUND).text.startswith("no:"), address
        assert came == []


@needs_passt
def test_frames_that_no_honest_kernel_sends_do_not_reach_it_either(nat: Machine) -> None:
    """Root in the guest puts the host's loopback, and other things, into raw frames."""
    with host_service("127.0.0.1") as (port, came), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        datagrams.settimeout(0.5)
        result = nat.exec(["python3", "-c", FORGE, str(port), str(datagrams.getsockname()[1]), "10.0.2.15"], timeout=BOUND)
        assert (result.text, result.error_text) == ("no answer\n", "")
        assert came == []
        with pytest.raises(TimeoutError):
            datagrams.recv(100)


@needs_passt
def test_the_hosts_other_addresses_are_out_of_reach(nat: Machine) -> None:
    if not own_addresses():
        pytest.skip("needs a host with an address")
    with host_service("0.0.0.0") as (port, came):
        for address in own_addresses():
            assert nat.exec(["python3", "-c", CONNECT, address, str(port)], timeout=BOUND).text.startswith("no:"), address
        assert came == []


@needs_passt
def test_what_lies_beyond_the_host_is_within_reach(nat: Machine) -> None:
    """Another network namespace with an address of its own stands for the rest of the world."""
    with elsewhere() as address:
        server = subprocess.Popen(
            ["ip", "netns", "exec", ELSEWHERE, sys.executable, "-c", BEYOND, address],
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            assert nat.exec(["python3", "-c", CONNECT, address, str(port), "30"], timeout=BOUND).text == "beyond\n"
        finally:
            server.kill()
            server.wait()


@needs_passt
def test_published_ports_outlive_a_stop(make: Make) -> None:
    port = free_port()
    machine = make(network="nat", ports={port: 80})
    for _ in range(2):
        with serving(machine):
            assert ask("127.0.0.1", port) == b"guest hello"
        machine.stop()
        with pytest.raises(ConnectionRefusedError):
            ask("127.0.0.1", port)
        machine.start()


@needs_passt
def test_a_taken_port(make: Make, wall_vmm: VMM) -> None:
    port = free_port()
    machine = wall_vmm.create("debian", wall="vm", network="nat", ports={port: 80})
    with socket.create_server(("127.0.0.1", port)), pytest.raises(EngineError, match=f"host port {port} on 127.0.0.1 is taken") as caught:
        machine.start()
    assert caught.value.hint
    assert machine.state is State.CREATED
    machine.start()
    with pytest.raises(EngineError, match="is taken"):
        make(network="nat", ports={port: 80})


def test_ports_need_a_network(wall_vmm: VMM) -> None:
    with pytest.raises(InvalidSpec, match="need a network"):
        wall_vmm.create("debian", wall="vm", ports={8080: 80})


@needs_passt
@pytest.mark.parametrize("who", ["keeper", "qemu", "passt"])
def test_whoever_is_killed_no_process_stays(make: Make, who: str) -> None:
    port = free_port()
    machine = make(network="nat", ports={port: 80})
    folder = MachineDir(Path(machine.info()["folder"]))
    keeper = proc.keeper_pid(folder)
    assert keeper is not None
    family = {Path(f"/proc/{pid}/comm").read_text().strip(): int(pid) for pid in children(keeper)} | {"keeper": keeper}
    victim = next(pid for name, pid in family.items() if name.startswith(who))
    fds = [os.pidfd_open(pid) for pid in family.values()]  # while they all live: a pid may be nobody's at any moment after that
    os.kill(victim, signal.SIGKILL)
    if who == "passt":
        # The machine lives on without its network; all goes when it goes.
        assert machine.exec(["echo", "alive"], timeout=BOUND).text == "alive\n"
        machine.stop()
    else:
        machine.wait(BOUND)
        assert machine.state is State.FAILED
    for fd in fds:
        signal_end(fd)
    assert not [pid for pid in processes(folder.root) if pid in family.values()]
    machine.start()
    machine.delete(force=True)


def children(pid: int) -> list[str]:
    """Those of its children's children too."""
    own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + [found for child in own for found in children(int(child))]


def signal_end(fd: int) -> None:
    """Wait for the process to end, at most a while."""
    import select

    assert select.select([fd], [], [], 30)[0]
    os.close(fd)


@needs_passt
def test_without_passt(wall_vmm: VMM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = wall_vmm.create("debian", wall="vm", network="nat")
    for program in ("qemu-img", "mkfs.ext4", "ldd"):
        (tmp_path / program).symlink_to(shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRIVISOR_QEMU", os.environ.get("TRIVISOR_QEMU") or "/usr/bin/qemu-system-x86_64")
    with pytest.raises(HostLacks, match="passt") as caught:
        wall_vmm.create("debian", wall="vm", network="nat")
    assert "passt" in caught.value.hint
    with pytest.raises(HostLacks, match="passt"):
        machine.start()
    assert machine.state is State.CREATED
    report = next(report for report in wall_vmm.walls() if report.wall == "vm")
    assert (report.available, report.features["nat"]) == (True, False)
    wall_vmm.create("debian", wall="vm", network="none").start()
