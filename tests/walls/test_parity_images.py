"""Images built from the Containerfiles in examples/images, with what Debian's own packages bring: python3, nginx, redis.

They are built once, behind the container wall, and run behind all of them: their programs are reached from the host by a published port.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from missing import lacks

from trivisor import VMM
from trivisor.core.errors import BuildFailed
from trivisor.core.spec import Wall
from trivisor.images.catalog import Image
from trivisor.va.build import caches
from trivisor.va.build.build import build
from trivisor.va.build.cache import prune
from trivisor.va.build.options import Options

EXAMPLES = Path(__file__).parents[2] / "examples/images"
NAMES = ("python", "nginx", "redis")
UNREACHED = re.compile(rb"Could not resolve|Failed to fetch|Unable to connect|Could not connect")


@pytest.fixture(scope="module")
def built(wall_home: VmHome) -> Iterator[dict[str, Image]]:
    """The three images, by the names of their folders."""
    with VMM(wall_home.root) as vmm:
        try:
            yield every(vmm)
        finally:
            for image in vmm.images.list():
                if image.name.startswith("example-"):
                    vmm.images.remove(image.name)
            prune(vmm.images.store)
            caches.prune(vmm)


def every(vmm: VMM) -> dict[str, Image]:
    for network in ("nat", "host"):  # where the mirror, or a proxy, is the host itself, machines on "nat" are denied it
        options = Options(arguments=proxies(), timeout=300, network=network)
        try:
            return {name: build(vmm, EXAMPLES / name, [f"example-{name}"], options=options) for name in NAMES}
        except BuildFailed as error:
            if not UNREACHED.search(error.output):
                raise
    return lacks("needs a Debian mirror that machines can reach")


def proxies() -> dict[str, str]:
    """How this host's apt reaches its mirror, if not directly."""
    found = {name: os.environ[name] for name in ("http_proxy", "https_proxy") if name in os.environ}
    if shutil.which("apt-config"):
        done = subprocess.run(["apt-config", "dump", "--format=%v", "Acquire::http::Proxy"], capture_output=True, text=True, check=True)
        if done.stdout.strip():
            found["http_proxy"] = done.stdout.strip()
    return found


def test_python(wall_vmm: VMM, wall: Wall, built: dict[str, Image]) -> None:
    with wall_vmm.run("example-python", wall=wall) as machine:
        assert machine.exec(["python3", "-c", "print(6 * 7)"], check=True).text == "42\n"
        done = machine.exec(machine.command(["you"]), check=True)
        assert json.loads(done.text) == {"greeting": "hello you", "user": "nobody", "folder": "/srv/greet"}


def test_nginx(wall_vmm: VMM, wall: Wall, built: dict[str, Image]) -> None:
    with wall_vmm.run("example-nginx", wall=wall, network="nat") as machine:
        port = machine.network.publish(80)
        machine.launch()
        assert machine.wait_healthy().status == "healthy"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            assert answer.read() == (EXAMPLES / "nginx/pages/index.html").read_bytes()
        assert (program := machine.program()) is not None and program.running


def test_redis(wall_vmm: VMM, wall: Wall, built: dict[str, Image]) -> None:
    with wall_vmm.run("example-redis", wall=wall, network="nat") as machine:
        port = machine.network.publish(6379)
        machine.launch()
        assert machine.wait_healthy().status == "healthy"
        assert redis(port, "PING") == "+PONG"
        assert redis(port, "SET", "key", "value") == "+OK"
        assert redis(port, "GET", "key") == "$5\r\nvalue"
        machine.stop()  # it is told by the stop signal, and saves
        assert b"DB saved on disk" in b"".join(machine.logs(source="program"))


def redis(port: int, *words: str) -> str:
    """Give one command in redis's protocol and return the answer. OSError if it does not come."""
    asked = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(asked.encode())
        line.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    if not answer:
        raise ConnectionError("no answer")
    return answer.decode().removesuffix("\r\n")
