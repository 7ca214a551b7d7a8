"""Who is at the other end of a connection, and how that is known.

unix:/path      a socket of this host's that only its owner reaches; who calls must be that user, or root
host:port       TLS 1.3, with certificates of both sides (`Tls`), or with a token that both know. A token's target shows a certificate
                that it made for this one time; each side proves that it knows the token for just this certificate, so nobody between
                them can stand in for either. Without TLS only if that is asked for: then there is neither secrecy nor a proof
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trivisor.core.errors import AlreadyExists, InvalidSpec, MigrationError, TrivisorError
from trivisor.core.process import find, run
from trivisor.vmm.migration.link import Link
from trivisor.vmm.migration.sealing import Sealing, TlsSealing

if TYPE_CHECKING:
    import ssl

_SHAKE = 10.0
"""Seconds for who calls to prove who it is."""
_CONNECT = 20.0
_TOKEN = 20
"""Letters that a token must have: it can be tried at leisure by who stands between."""
_PROOF = 32
_UNIX = "unix:"
_TCP = re.compile(r"(?:\[([0-9a-fA-F:.%a-z]+)\]|([^\[\]:/\s]+)):([0-9]{1,5})")


@dataclass(frozen=True)
class Tls:
    """Files (PEM) of one side: its certificate and key, and the authority that the other's certificate must be from.

    `name`: what the target's certificate must be for, if that is not the host of the address.
    """

    certificate: Path | str
    key: Path | str
    authority: Path | str
    name: str | None = None


@dataclass(frozen=True)
class Access:
    """How the two sides of a migration know each other: one of these, and over a unix socket none."""

    tls: Tls | None = None
    token: str | None = None
    plain: bool = False
    """Neither: anybody may be at the other end, and anybody between may read and change what is sent."""


@dataclass(frozen=True)
class Address:
    """A path of this host, or a TCP port."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str, access: Access) -> Address:
    """Return the address that is meant, if `access` fits it. Raises InvalidSpec."""
    given = [way for way in (access.tls, access.token, access.plain or None) if way is not None]
    if text.startswith(_UNIX):
        if given:
            raise InvalidSpec("a unix socket is its owner's alone: it has neither TLS nor a token", hint="leave them out")
        return Address(path=Path(text.removeprefix(_UNIX)).absolute())
    match = _TCP.fullmatch(text)
    if not match or int(match[3]) > 65535:
        raise InvalidSpec(f"{text!r} is no address", hint="give HOST:PORT or unix:/PATH")
    if not given:
        hint = "give tls=Tls(...) or token=...; without either only with plain=True, where nobody else is on the way"
        raise InvalidSpec(f"nothing says who may be at {text}", hint=hint)
    if len(given) > 1:
        raise InvalidSpec("TLS with certificates, a token, or neither: it cannot be two of them", hint="give one")
    if access.token is not None and len(access.token) < _TOKEN:
        raise InvalidSpec(f"a token has at least {_TOKEN} letters", hint="`trivisor receive` makes one")
    return Address(host=match[1] or match[2], port=int(match[3]))


def connect(to: Address, access: Access) -> Link:
    """Call the target. Raises MigrationError, HostLacks."""
    try:
        sock = _dialled(to)
    except OSError as error:
        hint = "is `trivisor receive` running there?"
        raise MigrationError(f"nobody can be reached at {to}: {error.strerror or error}", hint=hint) from error
    try:
        sock.settimeout(_SHAKE)
        sealing = Sealing()
        if access.tls is not None:
            sealing = TlsSealing(sock, _context(access.tls, server=False), server=False, name=access.tls.name or to.host, timeout=_SHAKE)
        elif access.token is not None:
            sealing = TlsSealing(sock, _anybody(), server=False, name=None, timeout=_SHAKE)
            return Link(sock, sealing, _prove(sock, sealing, access.token, sealing.certificate, server=False))
        return Link(sock, sealing)
    except OSError as error:
        sock.close()
        raise MigrationError(f"the target at {to} ended the connection: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise


class Listener:
    """Where a target waits to be called. A context manager: the socket ends with it."""

    def __init__(self, at: Address, access: Access) -> None:
        self._access = access
        self._stack = contextlib.ExitStack()
        self._context: ssl.SSLContext | None = None
        self._certificate = b""
        try:
            if access.tls is not None:
                self._context = _context(access.tls, server=True)
            elif access.token is not None:
                self._context, self._certificate = _for_once(self._stack)
            self._socket = self._stack.enter_context(_bound(at, self._stack))
            self._socket.listen(4)
        except BaseException:
            self._stack.close()
            raise
        self.address = at if at.path is not None else Address(host=at.host, port=int(self._socket.getsockname()[1]))

    def accept(self, timeout: float | None, note: Callable[[str], None]) -> Link:
        """Wait for one who proves who it is; tell `note` of those who do not. Raises MigrationError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            # In slices, since a signal's handler runs between calls only.
            self._socket.settimeout(0.5)
            try:
                sock, peer = self._socket.accept()
            except TimeoutError:
                if deadline is not None and time.monotonic() > deadline:
                    raise MigrationError(f"nobody called in {timeout:g} s", hint="`trivisor migrate` calls") from None
                continue
            try:
                return self._welcome(sock)
            except (TrivisorError, OSError) as error:
                sock.close()
                note(f"a caller was sent away ({peer[0] if isinstance(peer, tuple) else 'here'}): {error}")
            except BaseException:
                sock.close()
                raise

    def _welcome(self, sock: socket.socket) -> Link:
        sock.settimeout(_SHAKE)
        if self.address.path is not None:
            _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user not in (0, os.geteuid()):
                raise MigrationError(f"it is user {user}")
        if self._context is None:
            return Link(sock, Sealing())
        sealing = TlsSealing(sock, self._context, server=True, name=None, timeout=_SHAKE)
        if self._access.token is None:
            return Link(sock, sealing)
        return Link(sock, sealing, _prove(sock, sealing, self._access.token, self._certificate, server=True))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def new_token() -> str:
    """Return a token that nobody guesses."""
    return secrets.token_urlsafe(24)


def _dialled(to: Address) -> socket.socket:
    if to.path is None:
        return socket.create_connection((to.host, to.port), timeout=_CONNECT)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(_CONNECT)
    try:
        folder = os.open(to.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{to.path.name}")
        finally:
            os.close(folder)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _bound(at: Address, stack: contextlib.ExitStack) -> Iterator[socket.socket]:
    try:
        if at.path is None:
            family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
            sock = socket.create_server((at.host, at.port), family=family, backlog=4)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            folder = os.open(at.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            sock.bind(f"/proc/self/fd/{folder}/{at.path.name}")
            # Before it listens nobody can connect.
            os.chmod(at.path.name, 0o600, dir_fd=folder)
            stack.callback(at.path.unlink, missing_ok=True)
    except OSError as error:
        if at.path is not None and at.path.exists():
            raise AlreadyExists(f"there is something at {at.path}", hint="remove it, or give another path") from error
        raise MigrationError(f"nobody can be waited for at {at}: {error.strerror or error}", hint="give another address") from error
    with sock:
        yield sock


def _context(tls: Tls, *, server: bool) -> ssl.SSLContext:
    import ssl  # here: see sealing.py

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.authority)
        context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        hint = "certificate, key and authority must be files in PEM"
        raise InvalidSpec(f"these certificates cannot be used: {error.strerror or error}", hint=hint) from error
    return context


def _anybody() -> ssl.SSLContext:
    """Take any certificate: the token then proves whose it is."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _for_once(stack: contextlib.ExitStack) -> tuple[ssl.SSLContext, bytes]:
    """Make a key and a certificate of its own; return what serves with them, and the certificate (DER)."""
    import ssl

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trivisor-")))
    key, certificate = folder / "key", folder / "certificate"
    command = [find("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run([*command, "-keyout", key, "-out", certificate, "-subj", "/CN=trivisor", "-days", "2"], timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    key.unlink()
    return context, der


def _prove(sock: socket.socket, sealing: Sealing, token: str, certificate: bytes, *, server: bool) -> bytes:
    """Have both sides prove that they know the token; return what came after that. The target is the first, which tells a stranger nothing.

    Raises MigrationError.
    """
    mine = secrets.token_bytes(_PROOF)
    came = bytearray()
    sock.sendall(sealing.sealed(mine))
    theirs = _exactly(sock, sealing, came, _PROOF)
    nonces = theirs + mine if server else mine + theirs

    def proof(who: bytes) -> bytes:
        said = b"trivisor migration 1\0" + who + b"\0" + nonces + hashlib.sha256(certificate).digest()
        return hmac.new(token.encode(), said, hashlib.sha256).digest()

    if server:
        sock.sendall(sealing.sealed(proof(b"target")))
    if not hmac.compare_digest(_exactly(sock, sealing, came, _PROOF), proof(b"source" if server else b"target")):
        raise MigrationError("the other side does not know the token", hint="give the one that `trivisor receive` printed")
    if not server:
        sock.sendall(sealing.sealed(proof(b"source")))
    return bytes(came)


def _exactly(sock: socket.socket, sealing: Sealing, came: bytearray, size: int) -> bytes:
    deadline = time.monotonic() + _SHAKE
    came += sealing.opened(b"")
    while len(came) < size:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        data = sock.recv(65536)
        if not data:
            raise MigrationError("the other side ended the connection before it proved who it is", hint="has it the same token?")
        came += sealing.opened(data)
    taken = bytes(came[:size])
    del came[:size]
    return taken
