"""Who we are, and to whom we say it: challenges, tokens, the Docker config and its helpers."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from registry_support import Fake, Puller, Request

from trivisor.core.errors import CallerError, EngineError, HostLacks, RegistryError
from trivisor.images.reference import REGISTRY
from trivisor.images.registry import credentials as module
from trivisor.images.registry.auth import Challenge, challenges
from trivisor.images.registry.credentials import Credentials, stored

ME = Credentials("me", "secret")


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as registry:
        yield registry


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (
            ['Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"'],
            [("bearer", "https://a/t", "s", "repository:x:pull,push")],
        ),
        (["Basic realm=plain"], [("basic", "plain", "", "")]),
        (['bearer Realm = "r" , Service="s"'], [("bearer", "r", "s", "")]),
        (['Bearer realm="r", Basic realm="b"'], [("bearer", "r", "", ""), ("basic", "b", "", "")]),
        (["Negotiate", 'Basic realm="b"'], [("negotiate", "", "", ""), ("basic", "b", "", "")]),
        (['Basic realm="a \\"quoted\\" one"'], [("basic", 'a "quoted" one', "", "")]),
        (["", ",,,", "=", "Frobnicate x=y", "Basic" + "x" * 100_000], []),
    ],
)
def test_challenges_are_read(headers: list[str], found: list[tuple[str, str, str, str]]) -> None:
    assert challenges(headers) == [Challenge(*one) for one in found]


# Tokens


class Tokens:
    """Makes `fake` ask for a token, which `self.realm` gives; what it was asked is in `asked`."""

    def __init__(self, fake: Fake, realm: str = "", **answer: Any) -> None:
        self.asked: list[tuple[dict[str, list[str]], str]] = []
        self.realm = realm or f"{fake.url}/token"
        self.answer = {"token": "good", **answer}
        self.status = 200
        self.accepts = {"Bearer good"}
        fake.hook = self.hook

    def hook(self, request: Request) -> bool:
        shown = request.headers.get("Authorization", "")
        if request.path.startswith("/token"):
            data = request.rfile.read(int(request.headers.get("Content-Length", "0"))).decode()
            self.asked.append((parse_qs(data or urlsplit(request.path).query), shown))
            request.answer(self.status, json.dumps(self.answer).encode())
        elif shown not in self.accepts and request.path != "/v2/":
            request.answer(401, WWW_Authenticate=f'Bearer realm="{self.realm}",service="here"')
        else:
            return False
        return True


def test_anybody_gets_a_token_and_keeps_it(fake: Fake, puller: Puller) -> None:
    tokens = Tokens(fake)
    puller(fake.image())
    assert tokens.asked == [({"service": ["here"], "scope": ["repository:some/app:pull"]}, "")], "once, for manifest and blobs"


def test_credentials_go_to_the_realm_alone(fake: Fake, puller: Puller) -> None:
    tokens = Tokens(fake)
    puller(fake.image(), credentials=ME)
    assert tokens.asked[0][1] == ME.basic and tokens.asked[0][0]["account"] == ["me"]
    assert {headers.get("Authorization", "") for _, path, headers in fake.seen if not path.startswith("/token")} == {"", "Bearer good"}


def test_identity_is_traded_for_a_token(fake: Fake, puller: Puller) -> None:
    tokens = Tokens(fake, token=None, access_token="good")
    puller(fake.image(), credentials=Credentials(identity="long-lived"))
    form, shown = tokens.asked[0]
    assert form["grant_type"] == ["refresh_token"] and form["refresh_token"] == ["long-lived"] and shown == ""


def test_own_token_is_shown_as_it_is(fake: Fake, puller: Puller) -> None:
    tokens = Tokens(fake)
    tokens.accepts = {"Bearer mine"}
    puller(fake.image(), credentials=Credentials(bearer="mine"))
    assert tokens.asked == []


def test_token_that_ran_out_is_renewed(fake: Fake, puller: Puller) -> None:
    """The registry says so with another 401, in the middle of a pull."""
    tokens = Tokens(fake)
    old = tokens.hook

    def hook(request: Request) -> bool:
        if "/blobs/" in request.path and "new" not in tokens.answer["token"]:
            tokens.answer["token"], tokens.accepts = "new", {"Bearer new"}
        return old(request)

    fake.hook = hook
    puller(fake.image())
    assert len(tokens.asked) == 2


def test_token_that_does_not_help_is_not_asked_for_again_and_again(fake: Fake, puller: Puller) -> None:
    tokens = Tokens(fake)
    tokens.accepts = set()
    with pytest.raises(RegistryError) as caught:
        puller(fake.image())
    assert caught.value.status == 401 and len(tokens.asked) <= 2


@pytest.mark.parametrize(
    "realm",
    [
        "http://registry.example.org/token",
        "ftp://127.0.0.1/token",
        "/token",
        "",
        "file:///etc/passwd",
        "https://me:pw@127.0.0.1/t",
        "http://[::",
        "https://a:99999/t",
    ],
)
def test_realm_over_plain_http_elsewhere_is_refused(fake: Fake, puller: Puller, realm: str) -> None:
    tokens = Tokens(fake, realm=realm or " ")
    with pytest.raises(RegistryError):
        puller(fake.image(), credentials=ME)
    assert tokens.asked == [] and not any("Authorization" in headers for _, _, headers in fake.seen)


@pytest.mark.parametrize("token", ["", None, 5, "two words", "line\r\nX-Evil: 1", "x\u00e9"])
def test_token_that_cannot_be_shown_is_refused(fake: Fake, puller: Puller, token: object) -> None:
    Tokens(fake, token=token)
    with pytest.raises(RegistryError, match="no token"):
        puller(fake.image())


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (403, 1), (404, 1), (500, 3), (429, 3)])
def test_realm_that_refuses(fake: Fake, puller: Puller, status: int, tries: int) -> None:
    tokens = Tokens(fake)
    tokens.status = status
    with pytest.raises(RegistryError, match="no token") as caught:
        puller(fake.image(), credentials=ME)
    assert caught.value.status == status and len(tokens.asked) == tries
    assert "secret" not in f"{caught.value} {caught.value.hint} {ME!r}"


def test_plain_http_elsewhere_must_be_chosen(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not loopback's gets https alone: nothing is said to it over plain HTTP, least of all a password."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Fake() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(RegistryError):
            puller("registry.example.org/some/app", credentials=ME)
        assert not [seen for seen in proxy.seen if seen[0] != "CONNECT"]


def test_proxy_of_the_environment_is_used(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as proxy:
        proxy.hook = lambda request: setattr(request, "path", urlsplit(request.path).path)
        name = proxy.image().replace(proxy.host, "registry.example.org:5000")
        monkeypatch.setenv("http_proxy", f"http://me:pw@{proxy.host}")
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
        puller(name, insecure=True)
        method, path, headers = proxy.seen[-1]
        assert method == "GET" and path.startswith("http://registry.example.org:5000/v2/")
        assert headers["proxy-authorization"] == Credentials("me", "pw").basic
        monkeypatch.setenv("no_proxy", "example.org")
        proxy.seen.clear()
        with pytest.raises(RegistryError):
            puller(name, insecure=True)
        assert proxy.seen == []


# The Docker config


def config(folder: Path, **content: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    "name", ["reg.example:5000", "https://reg.example:5000", "https://reg.example:5000/v1/", "http://reg.example:5000/v2/"]
)
def test_auths_are_found_by_host(tmp_path: Path, name: str) -> None:
    folder = config(tmp_path, auths={"other": auth("a:b"), name: auth("me:se:cret")})
    assert stored("reg.example:5000", folder) == Credentials("me", "se:cret")
    assert stored("reg.example", folder) is None


def test_hub_is_found_under_its_old_name(tmp_path: Path) -> None:
    assert stored(REGISTRY, config(tmp_path, auths={f"https://index.{REGISTRY}/v1/": auth("me:pw")})) == Credentials("me", "pw")


def test_tokens_of_the_config(tmp_path: Path) -> None:
    folder = config(tmp_path, auths={"a": {"identitytoken": "i", **auth("me:")}, "b": {"registrytoken": "r"}, "c": {}})
    assert stored("a", folder) == Credentials("me", identity="i")
    assert stored("b", folder) == Credentials(bearer="r")
    assert stored("c", folder) is None


def test_no_config_is_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored("a", tmp_path) is None
    monkeypatch.setenv("DOCKER_CONFIG", str(config(tmp_path, auths={"a": auth("x:y")})))
    assert stored("a") == Credentials("x", "y")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"auths": 5}',
        '{"auths": {"a": {"auth": "%%"}}}',
        '{"auths": {"a": {"auth": "bm9jb2xvbg=="}}}',
        '{"credsStore": "../evil"}',
    ],
)
def test_config_that_is_none_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CallerError, match=r"config\.json") as caught:
        stored("a", tmp_path)
    assert caught.value.hint


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credential helper on the PATH, to be written."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "docker-credential-mine"
    path.touch(mode=0o755)
    return path


def test_helper_is_asked(tmp_path: Path, helper: Path) -> None:
    helper.write_text('#!/bin/sh\nread -r key; printf \'{"Username": "%s", "Secret": "for %s"}\' "$1" "$key"\n')
    folder = config(tmp_path, credHelpers={"one": "mine"}, auths={"one": auth("not:this"), "two": auth("a:b")})
    assert stored("one", folder) == Credentials("get", "for one")
    assert stored("two", folder) == Credentials("a", "b")
    folder = config(tmp_path, credsStore="mine")
    assert stored(REGISTRY, folder) == Credentials("get", f"for https://index.{REGISTRY}/v1/")


def test_helper_may_have_an_identity_or_nothing(tmp_path: Path, helper: Path) -> None:
    folder = config(tmp_path, credsStore="mine")
    helper.write_text('#!/bin/sh\necho \'{"Username": "<token>", "Secret": "s"}\'\n')
    assert stored("a", folder) == Credentials(identity="s")
    helper.write_text("#!/bin/sh\necho credentials not found in native keychain; exit 1\n")
    assert stored("a", folder) is None


def test_helper_that_fails_is_said(tmp_path: Path, helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config(tmp_path, credsStore="mine")
    helper.write_text("#!/bin/sh\necho the keychain is locked; exit 1\n")
    with pytest.raises(EngineError, match="locked"):
        stored("a", folder)
    helper.write_text("#!/bin/sh\necho my-secret\n")
    with pytest.raises(EngineError, match="no JSON") as caught:
        stored("a", folder)
    assert "my-secret" not in f"{caught.value} {caught.value.output}"
    monkeypatch.setattr(module, "HELPER_SECONDS", 0.2)
    helper.write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(EngineError, match="took over"):
        stored("a", folder)
    with pytest.raises(HostLacks, match="docker-credential-none"):
        stored("a", config(tmp_path, credsStore="none"))


def test_config_is_used_by_a_pull(fake: Fake, puller: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(config(tmp_path, auths={fake.host: auth("me:secret")})))
    tokens = Tokens(fake)
    puller(fake.image(), credentials=None)
    assert tokens.asked[0][1] == ME.basic
