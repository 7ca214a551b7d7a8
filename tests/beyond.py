"""A piece of the internet of the tests' own: a network namespace with a resolver, and web servers at a few addresses.

The addresses are those of AMT relays (RFC 7450, given up), since a policy takes no address that is kept for tests to be a name's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SPACE = "tvbeyond"
HOST = "192.52.193.1"
RESOLVER, PYPI, FILES, OTHER = (f"192.52.193.{number}" for number in (2, 3, 4, 5))
NAMES = {
    "pypi.example": [PYPI],
    "a.files.example": [FILES],
    "deep.a.files.example": [FILES],
    "files.example": [OTHER],
    "other.example": [OTHER],
    "inner.example": ["10.99.0.1", "127.0.0.1", "169.254.169.254"],
    "half.example": ["10.99.0.1", PYPI],
    "self.example": [HOST],
}
_SERVER = r"""
import json, pathlib, socket, socketserver, ssl, struct, sys, threading
folder, names = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
def answer(query):
    at, labels = 12, []
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    kind = int.from_bytes(query[at + 1 : at + 3], "big")
    name = ".".join(labels)
    with open(folder / "asked", "a") as log:
        log.write(f"{kind} {name}\n")
    found = names.get(name.lower(), [])
    records = [b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton(ip) for ip in found]
    records.append(b"\xc0\x0c" + struct.pack(">HHIH", 65, 1, 60, 3) + b"\0\1\0")  # HTTPS, which is to be left out
    code = 0 if found else 3
    head = query[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(records), 0, 0)
    return head + query[12 : at + 5] + b"".join(records)
class Names(socketserver.BaseRequestHandler):
    def handle(self):
        data, server = self.request
        server.sendto(answer(data), self.client_address)
class Web(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            if self.server.server_address[1] == 443:
                self.request = context.wrap_socket(self.request, server_side=True)
            elif self.server.server_address[1] == 22:
                self.request.sendall(b"SSH-2.0-tests\r\n")
            while data := self.request.recv(65536):
                if data.startswith(b"GET /big"):
                    self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                    for _ in range(size >> 20):
                        self.request.sendall(block)
                elif data.startswith((b"GET ", b"echo")):
                    said = pages.get(data.split()[1] if b" " in data else b"", self.request.getsockname()[0].encode() + b" " + data)
                    self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
                    if b"Connection: close" in data:
                        break
        except OSError:
            pass
block = bytes(1 << 20)
pages = {b"/simple/thing/": b'<a href="/files/thing-1.0.tar.gz#sha256=0">thing</a>', b"/files/thing-1.0.tar.gz": bytes(100000)}
size = int(sys.argv[3])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128
servers = [socketserver.ThreadingUDPServer(("0.0.0.0", 53), Names), *(Server(("0.0.0.0", port), Web) for port in (22, 80, 443, 8080))]
quic = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
quic.bind(("0.0.0.0", 443))
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
while True:
    data, peer = quic.recvfrom(2000)
    quic.sendto(data, peer)
"""


@dataclass(frozen=True)
class Beyond:
    """What there is beyond."""

    folder: Path
    trusting: ssl.SSLContext
    """Trusts its servers, and checks their names."""

    def asked(self) -> list[str]:
        """The questions that its resolver had so far: "TYPE NAME"."""
        log = self.folder / "asked"
        return log.read_text().splitlines() if log.exists() else []


@contextlib.contextmanager
def beyond(folder: Path, *, size: int = 1 << 20) -> Iterator[Beyond]:
    """Make it; `size`: bytes of /big. Needs root, ip(8) and openssl(1)."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("openssl"):
        pytest.skip("needs root, ip(8) and openssl(1), to make hosts beyond")
    alternatives = ",".join(f"DNS:{name}" for name in NAMES)
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=tests"
    subprocess.run(
        [*make.split(), "-addext", f"subjectAltName={alternatives}", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )
    subprocess.run(["ip", "netns", "add", SPACE], check=True)
    try:
        for command in (
            f"ip link add {SPACE}0 type veth peer name {SPACE}1 netns {SPACE}",
            f"ip addr add {HOST}/24 dev {SPACE}0",
            f"ip link set {SPACE}0 up",
            f"ip -n {SPACE} link set lo up",
            *(f"ip -n {SPACE} addr add {address}/24 dev {SPACE}1" for address in (RESOLVER, PYPI, FILES, OTHER)),
            f"ip -n {SPACE} link set {SPACE}1 up",
        ):
            subprocess.run(command.split(), check=True)
        serve = ["ip", "netns", "exec", SPACE, sys.executable, "-c", _SERVER, str(folder), json.dumps(NAMES), str(size)]
        with subprocess.Popen(serve, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == b"ready\n"
                yield Beyond(folder, ssl.create_default_context(cafile=str(folder / "cert.pem")))
            finally:
                server.kill()
    finally:
        # The namespace takes its end of the pair down some time later, when the next test may make it again.
        subprocess.run(["ip", "link", "delete", f"{SPACE}0"], check=False)
        subprocess.run(["ip", "netns", "delete", SPACE], check=True)
