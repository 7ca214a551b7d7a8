"""Ports of the host that lead into a real guest (which here shares the host's network)."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from vos_support import RealGuest, Scripted, real_guest, scripted, within

from trivisor.core.errors import HostError, InvalidSpec
from trivisor.vos import wire
from trivisor.vos.forward import forward

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest() -> Iterator[RealGuest]:
    with real_guest() as running:
        yield running


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets, to the end of file."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client:
            try:
                while part := client.recv(65536):
                    client.sendall(part)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def receive(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def test_bytes_both_ways_and_half_closes(guest: RealGuest, echo: int) -> None:
    with forward(guest.processes, echo) as port, within(60), socket.create_connection(("127.0.0.1", port.port), 10) as client:
        data = os.urandom(MIB) * 8
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        assert receive(client) == data
        sender.join()


def test_many_connections(guest: RealGuest, echo: int) -> None:
    with forward(guest.processes, echo) as port, within(60):
        clients = [socket.create_connection(("127.0.0.1", port.port), 30) for _ in range(40)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"%d" % number
            client.close()


def test_nobody_listens_there(guest: RealGuest) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))  # nor can anybody else listen there meanwhile
    with taken, forward(guest.processes, taken.getsockname()[1]) as port, within(30):
        client = socket.create_connection(("127.0.0.1", port.port), 30)
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_refusal_that_a_busy_guest_says_late_is_one() -> None:
    said = threading.Event()

    def script(peer: Scripted) -> None:
        stream = peer.run_one()
        for channel in (wire.STDOUT, wire.STDERR):
            peer.raw(wire.data_head(stream, channel, 0))
        said.wait(0.5)  # the status comes when the guest has a processor again
        peer.exited(stream, 111)
        said.wait(30)

    with scripted(script) as peer, forward(peer.processes, 80) as port:
        with socket.create_connection(("127.0.0.1", port.port), 30) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        said.set()


def test_close_ends_everything(guest: RealGuest, echo: int) -> None:
    threads = threading.active_count()
    port = forward(guest.processes, echo)
    with within(30), socket.create_connection(("127.0.0.1", port.port), 5) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        port.close()
        port.close()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port.port), 5)
    for thread in threading.enumerate():
        if thread.name.startswith("forward"):
            thread.join(5)
    assert threading.active_count() <= threads + 1  # the echo server's own


def test_what_is_no_port_is_refused(guest: RealGuest, echo: int) -> None:
    for wrong in (0, -1, 65536, "80", True):
        with pytest.raises(InvalidSpec):
            forward(guest.processes, wrong)  # type: ignore[arg-type]
    with pytest.raises(HostError, match="cannot listen"):
        forward(guest.processes, 80, echo)
