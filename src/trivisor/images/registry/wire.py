"""HTTP, one request at a time: no redirect is followed here, nothing is retried, every wait ends.

urllib3 carries it. Its timeouts bound each single wait of a socket; a peer that drips a byte before each of them would still
hold us for ever, so a clock cuts the connection where headers or a document take too long as a whole, and a reader of blobs
watches the rate. The same cut ends everything at once when a pull is given up: connections in use are known by the thread
that uses them, and shutdown(2) wakes whoever waits in one.

Certificates are those of the system, or of $SSL_CERT_FILE and $SSL_CERT_DIR, which OpenSSL reads itself. Proxies are those of
the environment, never for a loopback address.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Self
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import BaseHTTPResponse

from trivisor.core.errors import RegistryError
from trivisor.images.registry.bounds import Bounds

AGENT = "trivisor"
READ = 256 << 10
SEND = 32 << 10
"""Sent at a time, each within the connect timeout: 3 KiB a second will do."""
UNPRINTABLE = re.compile(r"[^\x20-\x7e]+")
"""What a registry says is printed: nothing that moves a terminal's cursor is let through."""
_FOREIGN = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)
_using = threading.local()


class Cancelled(Exception):
    """The work was given up by whoever waits for it; it never reaches a caller of ours."""


class _Plain(HTTPConnection):
    def connect(self) -> None:
        _using.wire.note(self)
        super().connect()

    def putrequest(self, *args: object, **options: object) -> None:
        _using.wire.note(self)
        super().putrequest(*args, **options)  # type: ignore[arg-type]


class _Tls(HTTPSConnection):
    def connect(self) -> None:
        _using.wire.note(self)
        super().connect()
        # Whoever let this registry be insecure knows it: urllib3 would warn at every request.
        self.is_verified = True

    def putrequest(self, *args: object, **options: object) -> None:
        _using.wire.note(self)
        super().putrequest(*args, **options)  # type: ignore[arg-type]


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Tls


class Wire:
    """Connections to any host. Threads may use it at the same time, one request each."""

    def __init__(self, bounds: Bounds, *, verify: bool = True) -> None:
        self.bounds = bounds
        self._verify = verify
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._active: dict[int, HTTPConnection] = {}
        self._cancelled = threading.Event()

    def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | IO[bytes] | None = None) -> Answer:
        """Send one request and return the answer, its body unread. Raises RegistryError, Cancelled."""
        # Who takes a blob hashes it, or moves it into place, before it answers.
        silence = self.bounds.settle if method in ("PUT", "PATCH") else self.bounds.silence
        whole = self.bounds.transfer if body is not None and not isinstance(body, bytes) else self.bounds.connect + silence
        pool = self._pool(urlsplit(url))
        try:
            with self.edge(url), self.deadline(whole):
                response = pool.urlopen(
                    method,
                    url,
                    body=body,
                    headers={"User-Agent": AGENT, "Accept-Encoding": "identity", **headers},
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    decode_content=False,
                    timeout=urllib3.Timeout(connect=self.bounds.connect, read=silence),
                )
        except BaseException:
            self.done()
            raise
        return Answer(self, url, response)

    def wait(self, seconds: float) -> None:
        """Wait, or raise Cancelled at once when the work is given up."""
        if self._cancelled.wait(seconds):
            raise Cancelled

    def cancel(self) -> None:
        """Give everything up: whoever waits for the network wakes with Cancelled."""
        self._cancelled.set()
        with self._lock:
            for connection in self._active.values():
                _cut(connection)

    def close(self) -> None:
        """Close the idle connections."""
        for pool in self._pools.values():
            pool.clear()

    def note(self, connection: HTTPConnection) -> None:
        """Remember what this thread uses."""
        with self._lock:
            self._active[threading.get_ident()] = connection
        if self._cancelled.is_set():
            raise Cancelled

    def done(self) -> None:
        """This thread uses no connection any more."""
        with self._lock:
            self._active.pop(threading.get_ident(), None)

    @contextmanager
    def edge(self, url: str) -> Iterator[None]:
        """Raise RegistryError for whatever the network does, Cancelled if it was us."""
        if self._cancelled.is_set():
            raise Cancelled
        _using.wire = self
        try:
            yield
        except _FOREIGN as error:
            if self._cancelled.is_set():
                raise Cancelled from error
            raise _translated(error, url) from error

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Cut this thread's connection when the block takes longer."""
        thread = threading.get_ident()
        late = threading.Event()

        def end() -> None:
            late.set()
            with self._lock:
                if connection := self._active.get(thread):
                    _cut(connection)

        clock = threading.Timer(seconds, end)
        clock.daemon = True
        clock.start()
        try:
            yield
        except _FOREIGN:
            if not late.is_set():
                raise
        finally:
            clock.cancel()
        if late.is_set():  # also without an error: headers that are cut look as if they had ended
            raise TimeoutError(f"no whole answer in {seconds:g} s")

    def _pool(self, url: SplitResult) -> urllib3.PoolManager:
        proxy = _proxy(url)
        key = f"{url.scheme} {proxy}"
        with self._lock:
            if key not in self._pools:
                self._pools[key] = _manager(proxy, self._context() if "https" in key else None)
            return self._pools[key]

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if not self._verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _manager(proxy: str, context: ssl.SSLContext | None) -> urllib3.PoolManager:
    if proxy:
        parts = urlsplit(proxy)
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        headers = urllib3.make_headers(proxy_basic_auth=login)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        manager: urllib3.PoolManager = urllib3.ProxyManager(bare, proxy_headers=headers, ssl_context=context, maxsize=16, blocksize=SEND)
    else:
        manager = urllib3.PoolManager(ssl_context=context, maxsize=16, blocksize=SEND)
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    return manager


class Answer:
    """One answer: `status`, `headers`, and a body that is read by the caller. A context manager; leaving it lets the connection go."""

    def __init__(self, wire: Wire, url: str, response: BaseHTTPResponse) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self._wire = wire
        self._response = response

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the connection go: to the pool if the body was read to its end."""
        self._response.close()
        self._response.release_conn()
        self._wire.done()

    @property
    def length(self) -> int | None:
        """What Content-Length says, if it says a number."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    def read(self) -> bytes:
        """Return the next bytes as they come; none at the end. Raises RegistryError, also for an end that comes too early."""
        with self._wire.edge(self.url):
            return self._response.read1(READ)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body of a blob. Raises RegistryError if it comes slower than the bound."""
        bounds = self._wire.bounds
        mark, gained = time.monotonic(), 0
        while data := self.read():
            gained += len(data)
            passed = time.monotonic() - mark
            if passed > bounds.silence:
                if gained < bounds.slowest * passed:
                    host = urlsplit(self.url).netloc
                    raise RegistryError(f"{host} sent {gained} bytes in {passed:.0f} s", hint="try again later", transient=True)
                mark, gained = time.monotonic(), 0
            yield data

    def document(self, limit: int, what: str) -> bytes:
        """Return the body. Raises RegistryError where it is over `limit` bytes, of which no more is read."""
        too_large = RegistryError(f"{what} is larger than {limit} bytes: no registry has such a one", hint="is this a registry?")
        if (self.length or 0) > limit:
            raise too_large
        with self._wire.edge(self.url), self._wire.deadline(self._wire.bounds.document):
            parts, size = [], 0
            while data := self._response.read1(READ):
                parts.append(data)
                size += len(data)
                if size > limit:
                    raise too_large
        return b"".join(parts)


def address(text: str, base: str = "") -> SplitResult | None:
    """Read an address that a registry sends us to; None for what we do not go to: not http(s), no host, or a login in it."""
    try:
        parts = urlsplit(urljoin(base, text))
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        return None
    return parts if text and usable else None


def loopback(host: str) -> bool:
    """Tell whether `host` (a name or an address, without a port) is this very host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _proxy(url: SplitResult) -> str:
    host = url.hostname or ""
    proxies = urllib.request.getproxies_environment()
    if loopback(host) or urllib.request.proxy_bypass(f"{host}:{url.port}" if url.port else host, proxies):
        return ""
    proxy = proxies.get(url.scheme) or proxies.get("all") or ""
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _cut(connection: HTTPConnection) -> None:
    sock = connection.sock
    sock = getattr(sock, "socket", sock)  # TLS inside a proxy's TLS
    if not isinstance(sock, socket.socket):
        return  # not connected yet: the connect timeout ends it
    try:
        # Not SSLSocket's own: that one would let a reader take what is still encrypted for the body.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # closed meanwhile


def _translated(error: Exception, url: str) -> RegistryError:
    host = urlsplit(url).netloc.rpartition("@")[2]
    why = UNPRINTABLE.sub(" ", str(error))[:300]  # it may quote what the other side sent
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return RegistryError(f"the host {host} is not known", hint="check the name, and the DNS of this host", transient=True)
    if isinstance(error, urllib3.exceptions.SSLError) and ("CERTIFICATE" in why.upper() or "hostname" in why):
        hint = "set SSL_CERT_FILE to its authority's certificate, or allow this registry to be insecure"
        return RegistryError(f"the certificate of {host} is not trusted: {why}", hint=hint)
    if isinstance(error, urllib3.exceptions.ProxyError):
        return RegistryError(f"the proxy on the way to {host} failed: {why}", hint="check HTTPS_PROXY and NO_PROXY", transient=True)
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return RegistryError(f"{host} did not take a connection in time", hint="check the network, or HTTPS_PROXY", transient=True)
    if isinstance(error, urllib3.exceptions.ReadTimeoutError | TimeoutError):
        return RegistryError(f"{host} stalled: it sent nothing more", hint="try again later; what has come is kept", transient=True)
    if isinstance(error, ValueError) and not isinstance(error, urllib3.exceptions.HTTPError):
        return RegistryError(f"{url[:200]!r} cannot be asked for: {why}", hint="is this a registry?")
    return RegistryError(f"the connection to {host} broke: {why}", hint="try again; what has come is kept", transient=True)
