"""One registry, asked politely: tokens, redirects, retries.

Redirects are followed for GET and HEAD alone, at most five, never from https to http. What is shown to a registry is shown to
that scheme, host and port only: another origin gets no Authorization header.

A registry on a loopback address may speak plain HTTP, as with Docker; any other only where that was chosen. Which of the two
it speaks is found out once, by a request that shows nothing.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

import msgspec

from trivisor.core.errors import InvalidSpec, NotFound, RegistryError
from trivisor.images.reference import REGISTRY as HUB
from trivisor.images.registry.auth import Auth
from trivisor.images.registry.bounds import DEFAULT, ERROR, Bounds
from trivisor.images.registry.credentials import HUB_HOST, Credentials, stored
from trivisor.images.registry.wire import UNPRINTABLE, Answer, Wire, address, loopback

Body = bytes | Callable[[], IO[bytes]] | None
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 429, 500, 502, 503, 504)


class Patience:
    """How often one thing is tried: a bounded number of tries, each after a longer wait, or after what Retry-After says."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._failed = 0
        self._end = time.monotonic() + wire.bounds.transfer

    def gained(self) -> None:
        """Something came: begin to count anew."""
        self._failed = 0

    def wait(self, error: RegistryError, after: float | None = None) -> None:
        """Wait before the next try. Raises `error` if there is none, Cancelled."""
        bounds = self._wire.bounds
        self._failed += 1
        if not error.transient or self._failed >= bounds.tries or time.monotonic() > self._end:
            raise error
        pause = bounds.backoff * 2 ** (self._failed - 1) * random.uniform(0.75, 1.25)
        if after is not None:
            if after > bounds.patience:
                error.hint = f"the registry asks to wait {after:.0f} s: try again then"
                raise error
            pause = after
        self._wire.wait(pause)


class Client:
    """A registry. Threads may use it at the same time; `cancel` from any thread ends all of it."""

    def __init__(self, registry: str, *, credentials: Credentials | None = None, insecure: bool = False, bounds: Bounds = DEFAULT) -> None:
        """`registry` is host[:port]. `insecure`: plain HTTP and untrusted certificates are taken.

        Without `credentials` those of the Docker config are used. Raises InvalidSpec, and what `credentials.stored` raises.
        """
        self.registry = registry
        self.bounds = bounds
        self._host = HUB_HOST if registry == HUB else registry
        if address(f"https://{self._host}") is None:
            raise InvalidSpec(f"{registry!r} is not the address of a registry", hint="use host or host:port")
        self._local = loopback(urlsplit(f"//{self._host}").hostname or "")
        self._plain = insecure or self._local
        self.wire = Wire(bounds, verify=not self._plain)
        self._credentials = credentials if credentials is not None else stored(registry)
        self._auth: Auth | None = None
        self._lock = threading.Lock()
        self._base = ""

    def cancel(self) -> None:
        """Give up all that is under way, at once."""
        self.wire.cancel()

    def close(self) -> None:
        """Close the connections."""
        self.wire.close()

    def request(
        self,
        method: str,
        target: str,
        *,
        scope: str,
        what: str,
        expect: Collection[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        retry: bool = True,
    ) -> Answer:
        """Return the answer with one of the statuses of `expect`, its body unread.

        `target` is a path below /v2/ or a whole URL; `what` is said in errors. Raises NotFound, RegistryError, Cancelled.
        """
        patience = Patience(self.wire)
        while True:
            after = None
            try:
                answer = self._follow(method, self._url(target), scope, headers or {}, body)
                if answer.status in expect:
                    return answer
                with answer:
                    after = _retry_after(answer)
                    error = self._refused(answer, what)
            except RegistryError as broken:
                error = broken
            if isinstance(error, NotFound) or not retry:
                raise error
            patience.wait(error, after)

    def _url(self, target: str) -> str:
        with self._lock:
            if not self._base:
                self._base = self._probe() if self._plain else f"https://{self._host}"
                self._auth = Auth(self.wire, self._base, self._credentials)
        return urljoin(f"{self._base}/v2/", target)

    def _probe(self) -> str:
        schemes = ("http", "https") if self._local else ("https", "http")
        failed: RegistryError | None = None
        for scheme in schemes:
            try:
                with self.wire.send("GET", f"{scheme}://{self._host}/v2/", {}) as answer:
                    if scheme == "http" and answer.status == 400:
                        continue  # what a TLS server says to plain HTTP
                    answer.document(ERROR, "the answer to /v2/")
                return f"{scheme}://{self._host}"
            except RegistryError as error:
                failed = failed or error
        raise failed or RegistryError(f"{self.registry} speaks neither HTTP nor HTTPS", hint="is this a registry?")

    def _follow(self, method: str, url: str, scope: str, headers: Mapping[str, str], body: Body) -> Answer:
        for _ in range(self.bounds.redirects + 1):
            answer = self._authorized(method, url, scope, headers, body)
            if answer.status not in _REDIRECTS or method not in ("GET", "HEAD"):
                return answer
            with answer:
                url = self._next(url, answer.headers.get("Location", ""))
        raise RegistryError(f"{self.registry} redirects over {self.bounds.redirects} times", hint="is this a registry?")

    def _next(self, url: str, location: str) -> str:
        there = address(location, url)
        if there is None:
            raise RegistryError(f"{self.registry} redirects to {location[:200]!r}, which is no address", hint="is this a registry?")
        if there.scheme == "http" and urlsplit(url).scheme == "https":
            raise RegistryError(f"{self.registry} redirects from https to {location[:200]!r}: refused", hint="ask who runs this registry")
        return there.geturl()

    def _authorized(self, method: str, url: str, scope: str, headers: Mapping[str, str], body: Body) -> Answer:
        auth = self._auth
        if auth is None or _origin(url) != _origin(self._base):
            return self._send(method, url, headers, "", body)
        shown = auth.header(scope)
        answer = self._send(method, url, headers, shown, body)
        for _ in range(2):  # a token that ran out, then one for more than we thought
            if answer.status != 401:
                break
            with answer:
                shown = auth.respond(answer, scope, shown)
                if not shown:
                    raise self._refused(answer, scope)
            answer = self._send(method, url, headers, shown, body)
        return answer

    def _send(self, method: str, url: str, headers: Mapping[str, str], shown: str, body: Body) -> Answer:
        extra = {"Authorization": shown} if shown else {}
        if callable(body):
            with body() as file:
                return self.wire.send(method, url, {**headers, **extra}, file)
        return self.wire.send(method, url, {**headers, **extra}, body)

    def _refused(self, answer: Answer, what: str) -> RegistryError | NotFound:
        status = answer.status
        said = _said(answer)
        tail = f": {said}" if said else ""
        known = self._auth is not None and self._auth.known
        if status == 404:
            return NotFound(f"{self.registry} has no {what}{tail}", hint="check the name and the tag")
        if status in (401, 403):
            hint = "the credentials do not reach so far: log in as one who may" if known else f"log in first: docker login {self.registry}"
            return RegistryError(f"{self.registry} does not let us to {what}{tail}", status=status, hint=hint)
        if status == 429:
            hint = "try again later" if known else "try again later, or log in: a registry lets those it knows ask for more"
            return RegistryError(f"{self.registry} says that we ask too often{tail}", status=status, hint=hint, transient=True)
        hint = "try again later; what has come is kept" if status >= 500 else "is this a registry?"
        return RegistryError(f"{self.registry} answers {status} for {what}{tail}", status=status, hint=hint, transient=status in _AGAIN)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def _said(answer: Answer) -> str:
    """What the registry says is wrong, if it says it as registries do."""
    try:
        errors = msgspec.json.decode(answer.document(ERROR, "the error"), type=dict[str, Any]).get("errors")
    except (RegistryError, msgspec.MsgspecError):
        return ""
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    words = [str(first.get(key)) for key in ("code", "message") if isinstance(first.get(key), str)]
    return UNPRINTABLE.sub(" ", ": ".join(words))[:200].strip()


def _retry_after(answer: Answer) -> float | None:
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0) if text else None
    except (ValueError, OverflowError):
        return None
