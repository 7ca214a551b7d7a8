"""Authorization: what a registry asks for (RFC 9110, 11.6.1) and the tokens that answer it.

A Bearer challenge names a realm: it is asked for a token for the scope, with the credentials if there are any, without if not.
Tokens are kept by scope until shortly before they expire. The realm must be https, since credentials go there; only a registry
that may be spoken to over plain HTTP may have its realm on the same host over plain HTTP.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec

from trivisor.core.errors import RegistryError
from trivisor.images.registry.bounds import TOKEN
from trivisor.images.registry.credentials import Credentials
from trivisor.images.registry.wire import Answer, Wire, address, loopback

_CHALLENGE = 4096
_PAIR = re.compile(r"""([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))""")
_SCHEME = re.compile(r"(?:^|,)\s*(Bearer|Basic|Negotiate|Digest|NTLM)\b\s*", re.IGNORECASE)
_TOKEN = re.compile(r"[\x21-\x7e]+")
LIFE = 60.0
"""Of a token that does not say (distribution's token specification), in seconds."""
EARLY = 10.0


@dataclass(frozen=True)
class Challenge:
    """One way in that a registry offers; `scheme` is in lower case."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""


def challenges(headers: Sequence[str]) -> list[Challenge]:
    """Read the WWW-Authenticate headers of an answer. What is no challenge is left out."""
    found = []
    for header in headers:
        parts = _SCHEME.split(header[:_CHALLENGE])
        for scheme, rest in zip(parts[1::2], parts[2::2], strict=True):
            pairs = {key.lower(): re.sub(r"\\(.)", r"\1", quoted) or bare for key, quoted, bare in _PAIR.findall(rest)}
            found.append(Challenge(scheme.lower(), pairs.get("realm", ""), pairs.get("service", ""), pairs.get("scope", "")))
    return found


class Auth:
    """What we show to one registry. Threads may use it at the same time."""

    def __init__(self, wire: Wire, base: str, credentials: Credentials | None) -> None:
        """`base` is the registry's address, with its scheme."""
        self._wire = wire
        self._base = urlsplit(base)
        self._credentials = credentials
        self._lock = threading.Lock()
        self._headers: dict[str, tuple[str, float]] = {}
        self._basic = False

    @property
    def known(self) -> bool:
        """Whether there are credentials."""
        return self._credentials is not None

    def header(self, scope: str) -> str:
        """Return the Authorization header for requests of `scope`, "" for none (yet)."""
        if self._credentials and self._credentials.bearer:
            return f"Bearer {self._credentials.bearer}"
        if self._basic and self._credentials:
            return self._credentials.basic
        value, until = self._headers.get(scope, ("", 0.0))
        return value if time.monotonic() < until else ""

    def respond(self, refused: Answer, scope: str, shown: str) -> str:
        """Return the header that answers a 401, given to a request that had `shown`; "" if there is none. Raises RegistryError."""
        with self._lock:
            now = self.header(scope)
            if now and now != shown:
                return now  # another thread was first
            offered = challenges(refused.headers.getlist("WWW-Authenticate"))
            for challenge in offered:
                if challenge.scheme == "bearer":
                    return self._bearer(challenge, scope)
                if challenge.scheme == "basic" and self._credentials and self._credentials.username and not self._basic:
                    self._basic = True
                    return self._credentials.basic
            return ""

    def _bearer(self, challenge: Challenge, scope: str) -> str:
        scopes = [*scope.split(), *(word for word in challenge.scope.split() if word not in scope.split())]
        token, life = self._fetch(self._realm(challenge), challenge.service, scopes)
        header = f"Bearer {token}"
        self._headers[scope] = (header, time.monotonic() + max(life - EARLY, EARLY))
        return header

    def _realm(self, challenge: Challenge) -> str:
        realm = address(challenge.realm)
        host = (realm.hostname if realm else None) or ""
        plain_is_meant = self._base.scheme == "http" and (host == self._base.hostname or loopback(host))
        if realm is None or (realm.scheme == "http" and not plain_is_meant):
            raise RegistryError(
                f"{self._base.netloc} sends us for a token to {challenge.realm[:200]!r}, which is not https",
                hint="credentials are not shown there; ask who runs this registry",
            )
        return challenge.realm

    def _fetch(self, realm: str, service: str, scopes: Sequence[str]) -> tuple[str, float]:
        who = self._credentials or Credentials()
        pairs = [("service", service)] if service else []
        if who.identity:
            form = [("grant_type", "refresh_token"), ("refresh_token", who.identity), ("client_id", "trivisor"), *pairs]
            body = urlencode([*form, ("scope", " ".join(scopes))]).encode()
            answer = self._wire.send("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, body)
        else:
            query = urlencode([*pairs, *(("scope", scope) for scope in scopes), *([("account", who.username)] if who.username else [])])
            headers = {"Authorization": who.basic} if who.username else {}
            answer = self._wire.send("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers)
        host = urlsplit(realm).netloc
        with answer:
            if answer.status in (401, 403):
                raise RegistryError(
                    f"{host} gives no token for {' '.join(scopes)}: the credentials are refused"
                    if self.known
                    else f"{host} gives no token",
                    status=answer.status,
                    hint="log in again (`docker login`), or give other credentials",
                )
            if answer.status != 200:
                transient = answer.status == 429 or answer.status >= 500
                raise RegistryError(f"{host} gives no token: status {answer.status}", status=answer.status, transient=transient)
            return _token(answer.document(TOKEN, "the token"), host)


def _token(data: bytes, host: str) -> tuple[str, float]:
    try:
        answer = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise RegistryError(f"{host} gives no token: it answered no JSON object", hint="is this a registry?") from error
    token = answer.get("token") or answer.get("access_token")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise RegistryError(f"{host} gives no token that can be shown", hint="is this a registry?")
    life = answer.get("expires_in")
    return token, float(life) if isinstance(life, int | float) and 0 < life < 1e9 else LIFE
