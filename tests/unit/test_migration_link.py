"""What lies between two homes: who is let in, what is believed of what comes. No machine is needed for that."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from trivisor import InvalidSpec, MigrationError, Tls
from trivisor.core.errors import AlreadyExists
from trivisor.core.process import run
from trivisor.vmm.migration import link as links
from trivisor.vmm.migration.link import MEMORY, Link
from trivisor.vmm.migration.messages import Failed, Go, Loaded, Ready, Wants
from trivisor.vmm.migration.sealing import Sealing
from trivisor.vmm.migration.transport import Access, Listener, address, connect, new_token

ANY = "127.0.0.1:0"


@contextmanager
def met(server: Access, client: Access, at: str = ANY) -> Iterator[tuple[Link, Link]]:
    """Both ends of a link. What keeps them apart is raised."""
    said: list[str] = []
    accepted: list[Link] = []
    with Listener(address(at, server), server) as listener:

        def accept() -> None:
            with suppress(MigrationError, OSError):
                accepted.append(listener.accept(10, said.append))

        waiting = threading.Thread(target=accept)
        waiting.start()
        try:
            source = connect(listener.address, client)
        except MigrationError as error:
            error.add_note(" ".join(said))
            raise
        finally:
            if not accepted:
                waiting.join(0.3)
        waiting.join()
        with source, accepted[0] as target:
            yield source, target


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tls]:
    """Make certificates of one authority, or with "stranger" of another."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str) -> Tls:
        issuer = "other" if name == "stranger" else "authority"
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        if not (folder / issuer).exists():
            run(
                ["openssl", "req", "-x509", *curve, "-keyout", folder / f"{issuer}.key", "-out", folder / issuer, "-subj", "/CN=a"],
                timeout=20,
            )
        signer = ["-CA", folder / issuer, "-CAkey", folder / f"{issuer}.key", "-addext", "subjectAltName=IP:127.0.0.1"]
        extra = ["-addext", "basicConstraints=critical,CA:FALSE"]
        own = ["-keyout", folder / f"{name}.key", "-out", folder / name, "-subj", f"/CN={name}"]
        run(["openssl", "req", "-x509", *curve, *own, *signer, *extra], timeout=20)
        return Tls(folder / name, folder / f"{name}.key", folder / "authority")

    return make


def carries(source: Link, target: Link) -> None:
    """Whether messages and bytes go both ways, to their end."""
    source.send(Go())
    assert target.receive(Go, 30) == Go()
    ours, theirs = socket.socketpair()
    inner, outer = socket.socketpair()
    source.open(MEMORY, theirs)
    target.open(MEMORY, outer)
    data = os.urandom(3 << 20)
    sender = threading.Thread(target=lambda: (ours.sendall(data), ours.shutdown(socket.SHUT_WR)))
    sender.start()
    inner.settimeout(30)
    came = b""
    while piece := inner.recv(1 << 20):
        came += piece
    assert came == data and target.ended(MEMORY)
    inner.sendall(b"back")
    ours.settimeout(30)
    assert ours.recv(10) == b"back"
    assert (source.sent(MEMORY), target.received(MEMORY)) == (len(data), len(data))
    for end in (ours, inner):
        end.close()
    sender.join()


def test_a_token_lets_in(tmp_path: Path) -> None:
    token = new_token()
    with met(Access(token=token), Access(token=token)) as (source, target):
        carries(source, target)


@pytest.mark.parametrize("wrong", [Access(token="x" * 32), Access(plain=True)])
def test_who_does_not_know_the_token_is_sent_away_and_the_next_is_let_in(wrong: Access) -> None:
    token = new_token()
    right, notes = Access(token=token), list[str]()
    with Listener(address(ANY, right), right) as listener:
        got: list[Link] = []
        waiting = threading.Thread(target=lambda: got.append(listener.accept(30, notes.append)))
        waiting.start()
        if wrong.plain:
            with socket.create_connection(("127.0.0.1", listener.address.port)) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n" * 10)
                assert b"Wants" not in sock.recv(1000)
        else:
            with pytest.raises(MigrationError, match="does not know the token"):
                connect(listener.address, wrong)
        with connect(listener.address, right) as source:
            waiting.join(30)
            source.send(Go())
            assert got[0].receive(Go, 5)
            got[0].close()
    assert len(notes) == 1 and "was sent away" in notes[0]


def test_certificates_of_both_sides(certificates: Callable[[str], Tls]) -> None:
    with met(Access(tls=certificates("target")), Access(tls=certificates("source"))) as (source, target):
        carries(source, target)
    with pytest.raises(MigrationError, match="TLS"), met(Access(tls=certificates("stranger")), Access(tls=certificates("source"))):
        pass


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    at = f"unix:{tmp_path / 'socket'}"
    with met(Access(), Access(), at) as (source, target):
        assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
        carries(source, target)
    assert not (tmp_path / "socket").exists()
    (tmp_path / "socket").write_text("mine")
    with pytest.raises(AlreadyExists):
        Listener(address(at, Access()), Access())
    assert (tmp_path / "socket").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "access", "why"),
    [
        ("host", Access(plain=True), "no address"),
        ("host:99999", Access(plain=True), "no address"),
        ("host:1", Access(), "nothing says who"),
        ("host:1", Access(token="short"), "at least"),
        ("host:1", Access(token="x" * 30, plain=True), "cannot be two"),
        ("unix:/x", Access(plain=True), "owner's alone"),
    ],
)
def test_addresses_that_are_refused(text: str, access: Access, why: str) -> None:
    with pytest.raises(InvalidSpec, match=why):
        address(text, access)


def test_addresses() -> None:
    plain = Access(plain=True)
    assert str(address("[::1]:7", plain)) == "[::1]:7" and address("a.example:80", plain).host == "a.example"
    assert str(address("unix:/a/b", Access())) == "unix:/a/b"


@pytest.fixture
def hostile() -> Iterator[tuple[Link, socket.socket]]:
    """A link, and the bare socket of who is at its other end."""
    ours, theirs = socket.socketpair()
    with Link(ours, Sealing()) as link, theirs:
        yield link, theirs


def frame(kind: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<BI", kind, len(payload) if length is None else length) + payload


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (frame(1, b"{}"), "no message"),
        (frame(1, b"\xff\xfe"), "no message"),
        (frame(1, b"[" * 5000), "no message"),
        (frame(1, b'{"type":"running","seconds":-1}'), "no message"),
        (frame(1, b'{"type":"hello","version":1}'), "no message"),
        (frame(1, b"", 2 << 20), "frame of 2097152 bytes"),
        (frame(2, b"", 1 << 31), "frame of"),
        (frame(2, b"x"), "not open"),
        (frame(200, b"x"), "not open"),
        (frame(1, b'{"type":"go"}') * 40, "more than it is asked"),
        (frame(1, b'{"type":"ready"}'), "Ready where that means nothing"),
        (b"", "closed the connection"),
    ],
)
def test_what_no_source_would_say(hostile: tuple[Link, socket.socket], said: bytes, why: str) -> None:
    link, other = hostile
    other.sendall(said)
    if not said:
        other.shutdown(socket.SHUT_WR)
    if b'"go"' in said:
        end = time.monotonic() + 30
        while link._failure is None and time.monotonic() < end:
            time.sleep(0.01)  # who receives sooner makes room for more
        with pytest.raises(MigrationError, match=why):
            for _ in range(40):
                link.receive(Go, 2)
        return
    with pytest.raises(MigrationError, match=why):
        link.receive(Wants, 5)


def test_the_other_sides_failure_is_told(hostile: tuple[Link, socket.socket]) -> None:
    link, other = hostile
    other.sendall(frame(1, b'{"type":"failed","why":"no room","hint":"make some"}'))
    with pytest.raises(links.Refused, match="the other side says: no room") as caught:
        link.receive(Ready, 5)
    assert caught.value.hint == "make some"
    link.send(Failed("over"))
    assert b"over" in other.recv(1000)


def test_who_is_silent_is_gone(hostile: tuple[Link, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    link, _ = hostile
    with pytest.raises(MigrationError, match=r"did not answer in 0\.2 s"):
        link.receive(Loaded, 0.2)
    monkeypatch.setattr(links, "SILENCE", 0.3)
    with pytest.raises(MigrationError, match="silent"):
        link.receive(Loaded, 10)
