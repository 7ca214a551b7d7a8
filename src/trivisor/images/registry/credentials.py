"""Who we are to a registry: Docker's config file and its credential helpers.

`$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`: `credHelpers` for one registry, then `credsStore` for all, then
`auths`. A helper is the program docker-credential-NAME: `get` reads the registry on standard input and answers JSON
(docker-credential-helpers). Docker Hub is filed under the address it had in 2013.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from trivisor.core.errors import CallerError, EngineError, HostLacks
from trivisor.core.units import MIB
from trivisor.images.reference import REGISTRY as HUB

HUB_HOST = f"registry-1.{HUB}"
"""Where Docker Hub itself listens."""
_HUB_KEY = f"https://index.{HUB}/v1/"
_HUB_HOSTS = {HUB, f"index.{HUB}", HUB_HOST}
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HELPER_SECONDS = 30.0
LARGEST = 1 * MIB
"""Of the config file, and of a helper's answer."""


@dataclass(frozen=True)
class Credentials:
    """A user and password, or `identity` (a refresh token), or `bearer` (a token for the registry itself)."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    bearer: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def stored(registry: str, folder: Path | None = None) -> Credentials | None:
    """Return what the Docker config says for `registry` (host[:port]), None if nothing.

    Raises CallerError for a config that cannot be read, HostLacks for a helper that is not there, EngineError for one that fails.
    """
    folder = folder or Path(os.environ.get("DOCKER_CONFIG") or Path("~/.docker").expanduser())
    path = folder / "config.json"
    config = _read(path)
    key = _HUB_KEY if registry in _HUB_HOSTS else registry
    helpers = _table(config, "credHelpers", path)
    named = helpers.get(registry) or helpers.get(key) or config.get("credsStore")
    if named:
        return _ask(str(named), key, path)
    auths = _table(config, "auths", path)
    for name, entry in auths.items():
        if isinstance(entry, dict) and _same(name, registry):
            return _entry(entry, name, path)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CallerError(f"{path}: {error.strerror}", hint="set DOCKER_CONFIG to a folder that you may read") from error
    try:
        config = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise _bad(path, str(error)) from error
    if len(data) > LARGEST or not isinstance(config, dict):
        raise _bad(path, "it is not one JSON object")
    return config


def _table(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = config.get(name) or {}
    if not isinstance(table, dict):
        raise _bad(path, f"{name} is not an object")
    return table


def _same(name: str, registry: str) -> bool:
    host = urlsplit(name).netloc if "://" in name else name.partition("/")[0]
    return host == registry or (host in _HUB_HOSTS and registry in _HUB_HOSTS)


def _entry(entry: dict[str, Any], name: str, path: Path) -> Credentials | None:
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if auth := entry.get("auth"):
        try:
            username, colon, password = base64.b64decode(str(auth), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise _bad(path, f"the auth of {name} is not base64 of user:password") from error
        if not colon:
            raise _bad(path, f"the auth of {name} is not base64 of user:password")
        password = password.strip("\0")
    identity, bearer = str(entry.get("identitytoken") or ""), str(entry.get("registrytoken") or "")
    return Credentials(username, password, identity, bearer) if username or identity or bearer else None


def _ask(helper: str, key: str, path: Path) -> Credentials | None:
    if not _HELPER.fullmatch(helper):
        raise _bad(path, f"{helper[:80]!r} is not the name of a credential helper")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run([program, "get"], input=key.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False)
    except FileNotFoundError as error:
        raise HostLacks(f"{program} is not installed, and {path} names it", hint=f"install {program}, or take it out of {path}") from error
    except OSError as error:
        raise EngineError(f"{program} cannot be run", command=[program, "get"], output=str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{program} took over {HELPER_SECONDS:g} s", command=[program, "get"], hint="does it wait for a key?") from error
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:].decode(errors="replace")
        if "credentials not found" in said:
            return None
        raise EngineError(f"{program} failed ({done.returncode})", command=[program, "get"], status=done.returncode, output=said)
    return _answered(done.stdout, program)


def _answered(data: bytes, program: str) -> Credentials | None:
    try:
        answer = msgspec.json.decode(data[:LARGEST], type=dict[str, Any])
    except msgspec.MsgspecError as error:
        # What it said may hold a secret: it is not repeated.
        raise EngineError(f"{program} answered no JSON object", command=[program, "get"]) from error
    username, secret = str(answer.get("Username") or ""), str(answer.get("Secret") or "")
    if username == "<token>":
        return Credentials(identity=secret)
    return Credentials(username, secret) if username or secret else None


def _bad(path: Path, why: str) -> CallerError:
    return CallerError(f"{path}: {why}", hint="mend the file, or set DOCKER_CONFIG to another folder")
