"""A network of fakes: programs connect to names, Python functions answer, and all that went over is recorded.

For machines without a network (`network="none"`): what is faked is connect(2), and the wall is that there is nowhere to go. The
program's socket is replaced by one end of a pair, and the function has the other. Names become addresses of 198.18.0.0/15, the
range for tests (RFC 2544): those that are known through /etc/hosts, the rest (a pattern such as "*.example.com") by a name server that is
itself a fake, asked over TCP.
"""

from __future__ import annotations

import errno
import fnmatch
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from trivisor.vos.syscalls.builtin.files import files
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

_FIRST = int(ipaddress.IPv4Address("198.18.0.1"))
_SERVER = "198.18.0.1"
_MAX_NAMES = 4096
_MAX_OPEN = 256
_MAX_RECORD = 1 << 20
_SOL_TCP, _SOL_IP, _SOL_IPV6 = 6, 0, 41


@dataclass
class Connection:
    """One connection, as the function that answers it has it."""

    name: str
    """What the program connected to: a name, or the address where it asked for none."""
    port: int
    sent: bytearray = field(default_factory=bytearray)
    """What the program sent, as far as it was read; at most 1 MiB is kept, and the same of `received`."""
    received: bytearray = field(default_factory=bytearray)
    """What it was answered."""
    refused: bool = False
    error: str = ""
    """What the function raised."""
    pair: socket.socket | None = None
    """Our end, while it is open."""

    def recv(self, size: int = 65536) -> bytes:
        """Return what the program sent next, b"" at its end."""
        data = self.end().recv(size)
        self.sent += data[: max(0, _MAX_RECORD - len(self.sent))]
        return data

    def recv_until(self, mark: bytes, most: int = 65536) -> bytes:
        """Return what the program sent up to `mark`, or its end, or `most` bytes."""
        data = b""
        while mark not in data and len(data) < most and (more := self.recv(most - len(data))):
            data += more
        return data

    def send(self, data: bytes) -> None:
        """Send all of `data` to the program."""
        self.end().sendall(data)
        self.received += data[: max(0, _MAX_RECORD - len(self.received))]

    def end(self) -> socket.socket:
        """Return our end. Raises ConnectionError when it is closed."""
        if self.pair is None:
            raise ConnectionError(f"the connection to {self.name} is closed")
        return self.pair


Server = Callable[[Connection], object]


class FakeNet:
    """The network that a policy's programs see. Servers are added with `host` before the first command."""

    def __init__(self, policy: Policy) -> None:
        self.connections: list[Connection] = []
        """All that were asked for, refused ones too, in order."""
        self._servers: list[tuple[str, int | None, Server]] = []
        self._names: dict[str, str] = {}
        self._ours: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._address_of(".nameserver")
        files(
            policy,
            {
                "/etc/hosts": lambda _: self._hosts(),
                "/etc/resolv.conf": f"nameserver {_SERVER}\noptions use-vc timeout:5 attempts:1\n",
            },
        )
        policy.on("connect")(self._connect)
        policy.on("getpeername", "getsockname")(self._told)
        # Options of TCP and IP mean nothing to the socket that stands in for one of theirs.
        for level in (_SOL_TCP, _SOL_IP, _SOL_IPV6):
            policy.returns("setsockopt", 0, args={"level": level})

    def host(self, name: str, port: int | None = None) -> Callable[[Server], Server]:
        """Have the function under it answer connections to a name, a pattern ("*.example.com") or an address, on this port or all.

        It runs in a thread of its own for each connection, which is closed when it returns.
        """

        def wrap(server: Server) -> Server:
            self._servers.append((name.lower(), port, server))
            if not any(letter in name for letter in "*?["):
                self._address_of(name.lower())
            return server

        return wrap

    # -- answers to calls ---------------------------------------------------------------------------

    def _connect(self, call: Call) -> None:
        address = call.sockaddr()
        if address.family not in ("AF_INET", "AF_INET6"):
            call.proceed()
            return
        name = self._names.get(address.host, address.host)
        connection = Connection(name, address.port)
        server = self._answer_name if address.host == _SERVER and address.port == 53 else self._server(name, address.port)
        with self._lock:
            if server != self._answer_name:
                self.connections.append(connection)
            full = sum(one.pair is not None for one in self.connections) > _MAX_OPEN
        if server is None or full:
            connection.refused = True
            call.errno(errno.ECONNREFUSED)
            return
        ours, theirs = socket.socketpair()
        with theirs:
            mark = f"socket:[{os.fstat(theirs.fileno()).st_ino}]"
            self._ours[mark] = address.raw
            connection.pair = ours
            call.give(theirs, fd=call.arg("sockfd"))
        threading.Thread(target=self._serve, args=(connection, server, mark), name=f"fake {name}", daemon=True).start()

    def _told(self, call: Call) -> None:
        raw = self._ours.get(call.fd_path())
        if raw is None:
            call.proceed()
        else:
            call.write_sockaddr("addr", raw)
            call.returns(0)

    def _server(self, name: str, port: int) -> Server | None:
        for pattern, wanted, server in self._servers:
            if fnmatch.fnmatchcase(name, pattern) and wanted in (None, port):
                return server
        return None

    def _serve(self, connection: Connection, server: Server, mark: str) -> None:
        ours = connection.end()
        try:
            server(connection)
        except Exception as error:  # whatever a fake raises ends its connection, and shows in the record
            connection.error = f"{type(error).__name__}: {error}"
        finally:
            connection.pair = None
            ours.close()
            self._ours.pop(mark, None)

    # -- names --------------------------------------------------------------------------------------

    def _address_of(self, name: str) -> str | None:
        """Return the address of a name, the same each time; None when there have been too many."""
        with self._lock:
            for address, known in self._names.items():
                if known == name:
                    return address
            if len(self._names) >= _MAX_NAMES:
                return None
            address = str(ipaddress.IPv4Address(_FIRST + len(self._names)))
            self._names[address] = name
            return address

    def _hosts(self) -> str:
        known = [f"{address}\t{name}\n" for address, name in self._names.items() if not name.startswith(".")]
        return "127.0.0.1\tlocalhost\n::1\tlocalhost\n" + "".join(known)

    def _answer_name(self, connection: Connection) -> None:
        """A name server, over TCP (RFC 1035, 4.2.2)."""
        pending = b""
        while data := connection.recv(4096):
            pending += data
            while len(pending) >= 2 and len(pending) >= 2 + (size := int.from_bytes(pending[:2], "big")):
                answer = self._resolve(pending[2 : 2 + size])
                pending = pending[2 + size :]
                connection.send(len(answer).to_bytes(2, "big") + answer)

    def _resolve(self, query: bytes) -> bytes:
        """Answer one question: an A record for a name that some server has, else that there is no such name."""
        at = 12
        labels: list[str] = []
        while at < len(query) and query[at] and len(labels) < 128:
            labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace").lower())
            at += 1 + query[at]
        if len(query) < 12 or at + 5 > len(query):
            raise ConnectionError("a malformed question")
        kind, question = int.from_bytes(query[at + 1 : at + 3], "big"), query[12 : at + 5]
        name = ".".join(labels)
        known = any(fnmatch.fnmatchcase(name, pattern) for pattern, _, _ in self._servers)
        address = self._address_of(name) if known and kind == 1 else None
        record = b""
        if address is not None:
            record = struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4) + ipaddress.IPv4Address(address).packed
        flags = 0x8580 if known else 0x8583
        return query[:2] + struct.pack(">HHHHH", flags, 1, 1 if record else 0, 0, 0) + question + record
