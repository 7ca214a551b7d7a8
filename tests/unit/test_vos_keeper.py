"""The host's side of the line through the real keeper, as it runs with every wall."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from vos_support import TVINIT, Gate, within

from trivisor.core.errors import GuestError, GuestGone
from trivisor.core.paths import MachineDir
from trivisor.launch import keeper
from trivisor.vos import guest as guest_verbs
from trivisor.vos import wire
from trivisor.vos.files import Files
from trivisor.vos.forward import forward
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes
from trivisor.vos.wire import Type

MIB = 1 << 20


@contextmanager
def kept(folder: Path, *argv: str) -> Iterator[MachineDir]:
    """A keeper with `tvinit guest`, or what `argv` says, as its engine; the line is its descriptor 3."""
    if not TVINIT.exists():
        pytest.skip("tvinit is not built: make -C guest")
    machine = MachineDir(folder)
    machine.logs.mkdir(parents=True)
    with ExitStack() as stack:
        host, guest = socket.socketpair()
        read, write = os.pipe()
        for close in (host.close, guest.close, lambda: os.close(read), lambda: os.close(write)):
            stack.callback(close)
        plan = (
            ("fd", str(guest.fileno()), "3"),
            ("fd", str(write), "1"),
            ("fd", str(write), "2"),
            ("exec", *(argv or (str(TVINIT), "guest", "--fd", "3"))),
        )
        fds = [guest.fileno(), write]
        keeper.spawn(machine, processes=[keeper.Process("engine", plan)], line_fd=host.fileno(), logs={"engine": read}, fds=fds, wait=20.0)
    try:
        yield machine
    finally:
        keeper.kill(machine)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MachineDir]:
    with kept(tmp_path_factory.mktemp("kept") / ("long" * 30)) as running:
        yield running


@pytest.fixture
def line(machine: MachineDir) -> Iterator[Line]:
    line = Line.connect(machine.line, "m")
    yield line
    line.close()


@pytest.fixture
def processes(line: Line) -> Processes:
    return Processes(lambda: line, "m")


def test_commands_and_requests(line: Line, processes: Processes) -> None:
    assert processes.exec("echo $((6*7))").text == "42\n"
    assert processes.exec(["no-such"]).exit_code == 127
    assert 0 < guest_verbs.ping(line) < 5
    guest_verbs.configure(line, [["sync"]])
    info = line.keeper_info()
    assert int(info["keeper"]) > 1
    assert info["synced"] == "1"


def test_64_mb_both_ways(processes: Processes) -> None:
    data = os.urandom(MIB) * 64
    with within(30):
        assert processes.exec(["cat"], stdin=data).stdout == data


def test_files_there_and_back(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name in ("a", "b"):
        (tmp_path / "from" / name).write_bytes(os.urandom(5 * MIB))
    files = Files(processes)
    files.upload(tmp_path / "from", f"{tmp_path}/there")
    files.download(f"{tmp_path}/there", tmp_path / "back")
    for name in ("a", "b"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()


def test_many_clients(machine: MachineDir) -> None:
    lines = [Line.connect(machine.line, "m") for _ in range(10)]
    failures: list[BaseException] = []

    def work(line: Line) -> None:
        try:
            for turn in range(5):
                data = os.urandom(100_000) * turn
                assert Processes(lambda: line, "m").exec(["cat"], stdin=data).stdout == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for line in lines:
        line.close()
    assert not failures


def test_who_leaves_takes_its_commands_along(machine: MachineDir, tmp_path: Path) -> None:
    line = Line.connect(machine.line, "m")
    processes = Processes(lambda: line, "m")
    gates = Gate(tmp_path / "killed"), Gate(tmp_path / "detached")
    killed = processes.spawn(gates[0].script).pid
    processes.spawn(gates[1].script, detach=True, stdin=False)
    ended = os.pidfd_open(killed)
    line.close()
    assert select.select([ended], [], [], 30)[0]
    os.close(ended)
    for gate in gates:
        gate.open()
    assert gates[1].passed(30) and not gates[0].passed(0.2)


def test_a_forked_child_uses_a_line_of_its_own(machine: MachineDir, line: Line, processes: Processes) -> None:
    lines = {os.getpid(): line}

    def line_of() -> Line:
        if os.getpid() not in lines:
            assert line.closed
            lines[os.getpid()] = Line.connect(machine.line, "m")
        return lines[os.getpid()]

    def child(results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
        results.put(Processes(line_of, "m").exec("echo from the child").text)

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=child, args=(results,))
    process.start()
    assert results.get(timeout=60) == "from the child\n"
    process.join(30)
    assert processes.exec("echo still here").text == "still here\n"


def test_forward(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, forward(processes, server.getsockname()[1]) as port:
        client = socket.create_connection(("127.0.0.1", port.port), 10)
        peer, _ = server.accept()
        with client, peer:
            client.sendall(b"there")
            assert peer.recv(100) == b"there"
            peer.sendall(b"back")
            assert client.recv(100) == b"back"


def test_a_client_that_speaks_nonsense_harms_no_other(machine: MachineDir, processes: Processes) -> None:
    chance = random.Random(5)
    for kind in (Type.SYNC, Type.GONE, Type.OK, 0x7F):
        line = Line.connect(machine.line, "m")
        line.post(wire.frame(kind, 0, chance.randbytes(20)))
        assert line.wait_closed(30)
    assert processes.exec("echo fine").text == "fine\n"


def test_power_off_ends_the_line(tmp_path: Path) -> None:
    with kept(tmp_path / "m") as machine:
        line = Line.connect(machine.line, "m")
        guest_verbs.shutdown(line)
        assert line.wait_closed(30)
        with pytest.raises(GuestGone):
            Processes(lambda: line, "m").exec("true")


def test_a_killed_keeper_ends_the_line(tmp_path: Path) -> None:
    with kept(tmp_path / "m") as machine:
        line = Line.connect(machine.line, "m")
        killer = threading.Timer(0.2, keeper.kill, (machine,))
        killer.start()
        with within(30), pytest.raises(GuestGone):
            Processes(lambda: line, "m").exec("sleep 60")
        killer.join()  # of its sockets the kernel may close the client's before the one that listens
        with pytest.raises(GuestGone):
            Line.connect(machine.line, "m")


BABBLER = """
import os, random, socket, struct, sys
s = socket.socket(fileno=3)
got = b""
while len(got) < 32780 + 32: got += s.recv(65536)
s.sendall(b"\\x54\\x02\\0\\0" + struct.pack("<II", 20, 0) + got[-20:])
s.recv(1000)
while True: s.sendall(random.randbytes(5000))
"""


def test_a_guest_that_writes_random_bytes(tmp_path: Path) -> None:
    with kept(tmp_path / "m", os.path.realpath("/usr/bin/python3"), "-c", BABBLER) as machine, within(60):
        line = Line.connect(machine.line, "m")
        with pytest.raises(GuestError):
            Processes(lambda: line, "m").exec("true", timeout=30)
        assert Line.connect(machine.line, "m").keeper_info()["keeper"]
