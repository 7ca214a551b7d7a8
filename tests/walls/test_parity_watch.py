"""Looking at real machines: logs, with a guest that prints without end; figures, events, the report of the walls, forwarded ports."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, HostError, HostLacks, InvalidSpec, InvalidState, Machine, State, UnsupportedByWall
from trivisor.core.paths import MachineDir
from trivisor.launch import keeper
from trivisor.vmm.engines.vm import proc, runner

BOUND = 60.0
CAP = 128 << 10
ECHO = """\
import socket, sys, threading
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
def serve(client):
    with client:
        while part := client.recv(65536):
            client.sendall(part)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def place(machine: Machine) -> MachineDir:
    return MachineDir(Path(machine.info()["folder"]))


def log(machine: Machine, source: str = "serial") -> bytes:
    return b"".join(machine.logs(source=source))


def until(what: object) -> None:
    """Wait until `what()` is true: what a guest printed takes its time to the host's disk."""
    deadline = time.monotonic() + BOUND
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.walls("vm")
def test_the_console_is_logged(running: Machine) -> None:
    running.exec("echo on the console >/dev/console; printf 'caf\\303\\251\\033[31m\\0' >/dev/console", check=True)
    until(lambda: "café\x1b[31m\0".encode() in log(running))
    assert b"on the console\r\n" in log(running)
    running.exec("dmesg -n 8; echo '<1>from the kernel' >/dev/kmsg", check=True)
    until(lambda: b"from the kernel" in log(running))
    assert b"==> serial <==\n" in log(running, "all")
    with pytest.raises(InvalidSpec, match="no log 'syslog'"):
        running.logs(source="syslog")


def test_pid_1_logs_what_it_did(make: Make) -> None:
    machine = make(disk="ram")
    machine.files.write("/etc/trivisor/after-clone.d/10-fails", b"#!/bin/sh\nexit 3\n", mode=0o755, parents=True)
    machine.exec("kill -TERM 1")
    machine.wait(BOUND)
    assert log(machine, "init")


@pytest.mark.walls("vm")
def test_a_followed_log_ends_with_the_machine(make: Make) -> None:
    machine = make()
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.extend(machine.logs(follow=True)))
    reader.start()
    machine.exec("echo early >/dev/console", check=True)
    until(lambda: b"early" in b"".join(seen))
    machine.exec("echo late >/dev/console; sync", check=True)
    machine.stop()
    reader.join(BOUND)
    assert not reader.is_alive()
    assert b"late" in b"".join(seen)


@pytest.mark.walls("vm")
def test_a_guest_that_prints_without_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs stay under their cap on the disk, the machine answers and obeys, and its keeper works less than it."""
    assert keeper.spawn.__kwdefaults__["log_cap"] == 4 << 20
    monkeypatch.setitem(keeper.spawn.__kwdefaults__, "log_cap", CAP)
    machine = make()
    folder = place(machine).logs
    machine.spawn(f"yes {'0123456789' * 8} >/dev/console", detach=True)
    for turn in range(2):
        first = (folder / "serial.log.1").stat().st_ino if turn else None
        until(lambda first=first: (folder / "serial.log.1").exists() and (folder / "serial.log.1").stat().st_ino != first)
        names = {"serial.log", "serial.log.1", "init.log", "engine.log", "events.log"}
        until(lambda names=names: {path.name for path in folder.iterdir()} == names)  # between two steps of turning over, one lacks
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                assert (folder / name).stat().st_size <= CAP
    assert len(log(machine)) <= 2 * CAP
    assert machine.exec(["echo", "here"], timeout=BOUND).text == "here\n"
    pids = [proc.keeper_pid(place(machine)), runner.engine(place(machine))]
    keeps, runs = (proc.usage([pid]).cpu_seconds for pid in pids if pid is not None)
    assert keeps < runs
    machine.pause()
    machine.resume()
    machine.stop()
    assert machine.state is State.STOPPED


def test_stats(make: Make) -> None:
    machine = make(cpus=2)
    machine.exec("head -c 40M /dev/zero >/dev/shm/filled; head -c 10M /dev/zero >/root/file; sync", check=True)
    stats = machine.stats()
    assert stats.private > 40 << 20
    assert stats.shared > 0
    assert stats.cpu_seconds > 0
    said = stats.guest
    assert said["cpus"] == 2
    assert 200 << 20 < said["memory_total"] <= 256 << 20
    assert said["memory_available"] < said["memory_total"] - (40 << 20)
    assert said["disk_total"] - said["disk_free"] >= 10 << 20
    assert said["uptime"] > 0
    assert said["cpu_user"] + said["cpu_system"] > 0
    machine.pause()
    assert machine.stats().guest == {}
    assert machine.stats().private > 40 << 20
    machine.resume()
    machine.stop()
    with pytest.raises(InvalidState):
        machine.stats()


def test_info(running: Machine) -> None:
    info = running.info()
    assert json.loads(json.dumps(info)) == {**info, "spec": json.loads(json.dumps(info["spec"]))}
    assert (info["id"], info["name"], info["state"], info["wall"]) == (running.id, running.name, "running", running.spec.wall)
    assert info["spec"]["memory"] == 256 << 20
    assert info["spec"]["env"]["FROM_SPEC"] == "spec"
    assert info["started"] <= time.time()
    assert info["ended"] is None


@pytest.mark.walls("vm")
def test_facts(running: Machine) -> None:
    facts = running.info()["facts"]
    assert {"qemu", "accelerator", "kernel", "start", "jail"} <= facts.keys()
    assert facts["kernel"] == running.exec(["uname", "-r"]).text.strip()


def test_events(make: Make, wall_home: VmHome) -> None:
    with VMM(wall_home.root) as vmm:
        last = max((event.id for event in vmm.events()), default=0)
        seen: list[str] = []

        def follow() -> None:
            for event in vmm.events(last, follow=True, timeout=BOUND):
                if event.machine in ids:
                    seen.append(event.kind)
                    if event.kind == "deleted":
                        return

        ids: set[str] = set()
        machine = make()
        ids.add(machine.id)
        reader = threading.Thread(target=follow)
        reader.start()
        machine.pause()
        machine.resume()
        machine.stop()
        machine.start()
        machine.exec("kill -TERM 1")
        machine.wait(BOUND)
        machine.delete()
        reader.join(BOUND)
    assert seen == ["created", "started", "paused", "resumed", "stopped", "started", "stopped", "deleted"]


def test_walls(wall_vmm: VMM) -> None:
    reports = {report.wall: report for report in wall_vmm.walls()}
    assert [*reports] == ["vm", "gvisor", "container"]
    assert reports["vm"].available
    assert {"pause", "disk", "ice", "kvm", "nat"} <= reports["vm"].features.keys()
    assert {"qemu", "accelerator", "jail", "network"} <= reports["vm"].details.keys()
    for wall, report in reports.items():
        assert report.available or report.why
        if not report.available:
            with pytest.raises((UnsupportedByWall, HostLacks)):
                wall_vmm.create("debian", wall=wall)


@contextlib.contextmanager
def echoing(machine: Machine, port: int) -> Iterator[None]:
    with machine.spawn(["python3", "-c", ECHO, str(port)]) as server:
        assert server.stdout.readline(timeout=BOUND) == b"ready\n", server.stderr.read()
        yield


def test_forward(running: Machine) -> None:
    with echoing(running, 7000), running.forward(7000) as forward:
        with socket.create_connection(("127.0.0.1", forward.port), timeout=BOUND) as one:
            one.sendall(b"one")
            assert one.recv(100) == b"one"
            with socket.create_connection(("127.0.0.1", forward.port), timeout=BOUND) as two:
                data = os.urandom(1 << 20)
                threading.Thread(target=lambda: (two.sendall(data), two.shutdown(socket.SHUT_WR))).start()
                assert everything(two) == data
            one.sendall(b"still")
            assert one.recv(100) == b"still"
        with pytest.raises(HostError):
            running.forward(7000, forward.port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", forward.port), timeout=BOUND)


def test_forward_to_where_nobody_listens(running: Machine) -> None:
    with (
        running.forward(7001) as forward,
        socket.create_connection(("127.0.0.1", forward.port), timeout=BOUND) as client,
        pytest.raises(ConnectionResetError),
    ):
        client.recv(100)


def test_connections_end_when_the_machine_stops(make: Make) -> None:
    machine = make()
    with echoed(machine, 7002) as client:
        client.sendall(b"x")
        assert client.recv(100) == b"x"
        machine.stop()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    machine.start()
    with echoed(machine, 7002) as client:
        client.sendall(b"again")
        assert client.recv(100) == b"again"


@contextlib.contextmanager
def echoed(machine: Machine, port: int) -> Iterator[socket.socket]:
    """A connection through a forward to what echoes in the machine."""
    with (
        echoing(machine, port),
        machine.forward(port) as forward,
        socket.create_connection(("127.0.0.1", forward.port), timeout=BOUND) as client,
    ):
        yield client


def everything(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
