"""Frames that only a guest's root can forge, where machines have links of their own: none reaches the host."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor.launch.net import provide

FORGE = (Path(__file__).parents[1] / "walls/forge_frame.py").read_text()

pytestmark = pytest.mark.skipif(bool(provide.possible()), reason=f"needs links: {provide.possible()}")


def test_none_reaches_the_hosts_loopback(make: Make) -> None:
    machine = make(network="nat")
    address = machine.info()["facts"]["address"]
    came: list[str] = []
    with socket.create_server(("0.0.0.0", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("0.0.0.0", 0))
        datagrams.settimeout(0.5)

        def serve() -> None:
            while True:
                try:
                    came.append(server.accept()[1][0])
                except OSError:
                    return  # closed

        threading.Thread(target=serve, daemon=True).start()
        ports = [str(server.getsockname()[1]), str(datagrams.getsockname()[1])]
        result = machine.exec(["python3", "-c", FORGE, *ports, address], timeout=60)
        assert (result.text, result.error_text) == ("no answer\n", "")
        with pytest.raises(TimeoutError):
            datagrams.recv(100)
        server.shutdown(socket.SHUT_RDWR)
    assert came == []
