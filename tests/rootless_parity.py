"""What container and gVisor give an ordinary user: the same tests of both, each in a module of its own."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from host_state import processes
from migrating import until
from rootless_home import NOBODY, account, as_user, home_of

from trivisor import VMM, EngineError, HostLacks, Machine, State
from trivisor.core.spec import Wall
from trivisor.launch import cgroup_layout, ids

BOUND = 60.0
REACHED = """\
import socket, sys, threading
def reach(place):
    address, port = place.split(":")
    try:
        socket.create_connection((address, int(port)), timeout=1.5)
        print(place)
    except OSError:
        pass
threads = [threading.Thread(target=reach, args=[place]) for place in sys.argv[1:]]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
SERVE = """\
import socket
server = socket.create_server(("0.0.0.0", 80))
print("up", flush=True)
while True:
    with server.accept()[0] as client:
        client.sendall(b"machine " + client.recv(100))
"""
ECHO = """\
import hashlib, socket
server = socket.create_server(("0.0.0.0", 80))
print("up", flush=True)
with server.accept()[0] as client:
    size, digest = int.from_bytes(client.recv(8), "big"), hashlib.sha256()
    while size:
        data = client.recv(min(size, 1 << 20))
        digest.update(data)
        size -= len(data)
    client.sendall(digest.digest() * (1 << 13))
"""
FORGE = Path(__file__).with_name("walls") / "forge_frame.py"

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt")


@dataclass(frozen=True)
class User:
    """An ordinary user with a home, and the shape of ids that it gets."""

    id: int
    home: Path
    kind: str

    def does(self, work: Callable[[VMM], object]) -> None:
        def life() -> None:
            assert ids.probe(self.home).kind == self.kind
            with VMM(self.home) as vmm:
                try:
                    work(vmm)
                finally:
                    for machine in vmm.list():
                        machine.delete(force=True)

        as_user(self.id, life)


@pytest.fixture(scope="module", params=["single", "subids"])
def user(request: pytest.FixtureRequest, image_home: Path) -> Iterator[User]:
    """Somebody with the caller's id alone, and somebody with subordinate ids."""
    with ExitStack() as stack:
        number = stack.enter_context(account()) if request.param == "subids" else NOBODY
        home = stack.enter_context(home_of(number, image_home))
        yield User(number, home, request.param)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ask(port: int) -> bytes:
    with socket.socket() as client:
        client.settimeout(BOUND)
        client.connect(("127.0.0.1", port))
        client.sendall(b"hello")
        return client.recv(100)


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def reached(machine: Machine, places: list[str]) -> list[str]:
    """Return those of `places` (address:port) that the machine can connect to."""
    return machine.exec(["python3", "-c", REACHED, *places], timeout=BOUND, check=True).text.split()


class RootlessTests:
    """Inherited by the class of each wall, which says which one."""

    wall: Wall

    def test_the_whole_life(self, user: User) -> None:
        def life(vmm: VMM) -> None:
            machine = vmm.create("debian", wall=self.wall)
            machine.start()
            assert machine.exec(["id", "-u"], check=True).text == "0\n"
            assert machine.exec(["ls", "/sys/class/net"]).text.split() in ([], ["lo"])
            machine.exec("echo kept >/root/file", check=True)
            if user.kind == "subids":
                machine.exec("chown 12:34 /root/file", check=True)
                assert machine.exec(["id", "-u"], user="12").text == "12\n"
            machine.stop()
            machine.start()
            assert machine.files.read_text("/root/file") == "kept\n"
            assert machine.files.stat("/root/file").uid == (12 if user.kind == "subids" else 0)
            folder = Path(machine.info()["folder"])
            owners = {int(line.split()[1]) for pid in processes(folder) for line in _status(pid) if line.startswith("Uid:")}
            assert 0 not in owners, "nothing of it is root's"
            machine.delete(force=True)
            assert not folder.exists()

        user.does(life)

    @needs_passt
    def test_nat(self, user: User) -> None:
        """Published ports, the host's addresses, names, and a stop between."""
        port = free_port()

        def life(vmm: VMM) -> None:
            machine = vmm.create("debian", wall=self.wall, network="nat", ports={port: 80})
            for _ in range(2):
                machine.start()
                with machine.spawn(["python3", "-c", SERVE]) as server:
                    assert server.stdout.readline(timeout=BOUND) == b"up\n"
                    assert [ask(port), ask(port)] == [b"machine hello"] * 2
                machine.stop()
                with pytest.raises(ConnectionRefusedError):
                    ask(port)
            until(lambda: not processes(Path(machine.info()["folder"])))

        user.does(life)

    @needs_passt
    def test_much_data_both_ways(self, user: User) -> None:
        """Frames are whole, none is larger than the wire takes, and what is lost is sent again."""
        port = free_port()

        def life(vmm: VMM) -> None:
            machine = vmm.create("debian", wall=self.wall, network="nat", ports={port: 80})
            machine.start()
            data = random.Random(1).randbytes(1 << 18)
            with machine.spawn(["python3", "-c", ECHO]) as server, socket.socket() as client:
                assert server.stdout.readline(timeout=BOUND) == b"up\n"
                client.settimeout(BOUND)
                client.connect(("127.0.0.1", port))
                client.sendall(len(data).to_bytes(8, "big") + data)
                got = b"".join(iter(lambda: client.recv(1 << 20), b""))
            assert got == hashlib.sha256(data).digest() * (1 << 13)

        user.does(life)

    @needs_passt
    def test_a_killed_keeper_takes_all_with_it(self, user: User) -> None:
        port = free_port()

        def life(vmm: VMM) -> None:
            machine = vmm.create("debian", wall=self.wall, network="nat", ports={port: 80})
            machine.start()
            folder = Path(machine.info()["folder"])
            os.kill(int((folder / "keeper").read_text().split()[0]), signal.SIGKILL)
            machine.wait(BOUND)
            assert machine.state is State.FAILED
            until(lambda: refused(port) and not processes(folder))
            machine.start()
            assert machine.exec(["echo", "again"]).text == "again\n"

        user.does(life)

    def test_a_named_network_needs_root_and_says_so(self, user: User) -> None:
        def life(vmm: VMM) -> None:
            with pytest.raises(HostLacks, match="named network") as caught:
                vmm.create("debian", wall=self.wall, network="backend")
            assert "nat" in caught.value.hint
            for wish in ({"egress": []}, {"shape": {"loss": 0.5}}):
                with pytest.raises(HostLacks, match="links of their own need root"):
                    vmm.create("debian", wall=self.wall, network="nat", **wish)
            machine = vmm.create("debian", wall=self.wall, network="nat" if shutil.which("passt") else "none")
            if machine.spec.network == "nat":
                for change in (
                    lambda: machine.network.publish(80),
                    lambda: machine.network.restrict(),
                    lambda: machine.network.reshape(loss=1),
                ):
                    with pytest.raises(HostLacks, match="links of their own need root"):
                        change()
            machine.delete()
            assert "named networks" in next(report for report in vmm.walls() if report.wall == self.wall).details["network"]

        user.does(life)

    @needs_passt
    def test_what_is_denied(self, user: User) -> None:
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
        with socket.create_server(("0.0.0.0", 0)) as host, socket.create_server(("127.0.0.1", 0)) as inner:
            for server in (host, inner):
                server.settimeout(0.1)
            ports = [server.getsockname()[1] for server in (host, inner)]

            def life(vmm: VMM) -> None:
                machine = vmm.create("debian", wall=self.wall, network="nat")
                machine.start()
                addresses = ("127.0.0.1", "10.0.2.2", "10.0.2.3", "10.0.2.15", *(word for word in own if "." in word))
                places = [f"{address}:{port}" for address in addresses for port in ports]
                assert reached(machine, [*places, "169.254.169.254:80", "100.100.100.200:80"]) == []

            user.does(life)
            for server in (host, inner):
                with pytest.raises(TimeoutError):
                    server.accept()

    @needs_passt
    def test_frames_that_no_honest_kernel_sends(self, user: User) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.bind(("127.0.0.1", 0))
            datagrams.settimeout(0.1)
            server.settimeout(0.1)
            ports = [str(listening.getsockname()[1]) for listening in (server, datagrams)]
            forge = FORGE.read_text()

            def life(vmm: VMM) -> None:
                machine = vmm.create("debian", wall=self.wall, network="nat")
                machine.start()
                result = machine.exec(["python3", "-c", forge, *ports, "10.0.2.15"], timeout=BOUND)
                # gVisor lets nobody send frames, whichever its network stack, or sends them.
                assert result.text == "no answer\n" or (self.wall == "gvisor" and "Error" in result.error_text), result.error_text

            user.does(life)
            with pytest.raises(TimeoutError):
                server.accept()
            with pytest.raises(TimeoutError):
                datagrams.recv(100)

    @needs_passt
    def test_a_taken_port(self, user: User) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]

            def life(vmm: VMM) -> None:
                machine = vmm.create("debian", wall=self.wall, network="nat", ports={port: 80})
                with pytest.raises(EngineError, match=f"host port {port} on 127.0.0.1 is taken"):
                    machine.start()

            user.does(life)

    def test_a_limit_that_cannot_be_enforced_is_refused(self, user: User) -> None:
        def life(vmm: VMM) -> None:
            lacks = cgroup_layout.layout().lacks
            for name, limit in (("memory", {"memory": "64M"}), ("pids", {"pids": 50}), ("cpuset", {"cpuset": "0"})):
                if name not in lacks:
                    continue
                with pytest.raises(HostLacks, match=name) as caught:
                    vmm.create("debian", wall=self.wall, **limit)  # type: ignore[arg-type]
                assert caught.value.hint
            assert vmm.list() == []

        user.does(life)


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return []
