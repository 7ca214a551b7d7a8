"""A real registry on a loopback address: Debian's docker-registry, started for the tests.

with Registry(folder) as registry: ...                  # anybody may pull and push
with Registry(folder, login=("me", "secret")) as ...    # Basic (htpasswd)
with Registry(folder, login=..., tokens=True) as ...    # Bearer, from a token server of ours
with Registry(folder, name=HOST) as ...                 # TLS with a certificate of its own for HOST: registry.authority
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from missing import lacks

from trivisor.images.registry.credentials import Credentials

SECONDS = 60.0


def needs(*programs: str) -> None:
    """End the test where one of `programs` is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            lacks(f"needs {program} (Debian package {'apache2-utils' if program == 'htpasswd' else program})")


class Registry:
    """The registry; `host` is where it listens, `folder` what it keeps."""

    def __init__(self, folder: Path, *, login: tuple[str, str] | None = None, tokens: bool = False, name: str = "127.0.0.1") -> None:
        needs("docker-registry")
        self.folder = folder
        self.login = login
        self.authority = folder / "certificate.pem"
        self._name = name
        self._tls = name != "127.0.0.1"
        self._tokens = _Tokens(folder, login) if tokens else None
        # Kept until the registry has it: with this option it may have it, and nobody else who asks for any.
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind((name, 0))
        self._port = self._kept.getsockname()[1]
        self.host = f"{name}:{self._port}"
        self.log = folder / "registry.log"

    @property
    def credentials(self) -> Credentials:
        """Those that it takes."""
        return Credentials(*(self.login or ()))

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.yml"
        config.write_text(json.dumps(self._config()))  # YAML takes JSON
        if self._tokens is not None:
            self._tokens.start()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(["docker-registry", "serve", config], stdout=log, stderr=log)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection((self._name, self._port), 1).close()
                self._kept.close()
                return self
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.__exit__(None, None, None)
                    raise AssertionError(self.log.read_text()) from None
                time.sleep(0.01)  # it takes no socket from outside, and tells nobody when it listens

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        self._kept.close()
        if self._tokens is not None:
            self._tokens.stop()

    def requests(self, words: str) -> list[str]:
        """Return the lines of its access log that have `words`."""
        return [line for line in self.log.read_text().splitlines() if words in line and " HTTP/1.1" in line]

    def _config(self) -> dict[str, object]:
        http: dict[str, object] = {"addr": f"{self._name}:{self._port}", "secret": secrets.token_hex(8)}
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self.folder / "data")}},
            "http": http,
        }
        if self._tls:
            key = _certificate(self.folder, self.authority, self._name)
            http["tls"] = {"certificate": str(self.authority), "key": str(key)}
        if self._tokens is not None:
            _certificate(self.folder, self.authority, "token")
            config["auth"] = {
                "token": {"realm": self._tokens.realm, "service": "tests", "issuer": "tests", "rootcertbundle": str(self.authority)}
            }
        elif self.login:
            needs("htpasswd")
            passwords = self.folder / "htpasswd"
            passwords.write_bytes(subprocess.run(["htpasswd", "-Bbn", "-C", "4", *self.login], check=True, capture_output=True).stdout)
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(passwords)}}
        return config


def _certificate(folder: Path, certificate: Path, name: str) -> Path:
    needs("openssl")
    key = folder / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
    subprocess.run([*argv, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"], check=True, capture_output=True)
    return key


class _Tokens:
    """A token server (distribution's token specification): whoever shows the login gets what he asks for, anybody else may pull."""

    def __init__(self, folder: Path, login: tuple[str, str] | None) -> None:
        self._folder, self._login = folder, login
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                body = outer.token(self.path, self.headers.get("Authorization", ""))
                self.send_response(200 if body else 401)
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def token(self, path: str, shown: str) -> bytes:
        if shown and shown != Credentials(*(self._login or ())).basic:
            return b""
        access = []
        for scope in " ".join(parse_qs(urlsplit(path).query).get("scope", [])).split():
            kind, name, actions = scope.split(":")
            granted = [action for action in actions.split(",") if shown or action == "pull"]
            access.append({"type": kind, "name": name, "actions": granted})
        now = int(time.time())
        claims = {
            "iss": "tests",
            "aud": "tests",
            "sub": "",
            "iat": now,
            "nbf": now - 60,
            "exp": now + 300,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        der = subprocess.run(
            ["openssl", "x509", "-in", self._folder / "certificate.pem", "-outform", "DER"], check=True, capture_output=True
        )
        head = {"alg": "RS256", "typ": "JWT", "x5c": [base64.b64encode(der.stdout).decode()]}
        signed = b".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
        argv = ["openssl", "dgst", "-sha256", "-sign", self._folder / "key.pem"]
        signature = subprocess.run(argv, input=signed, check=True, capture_output=True).stdout
        return json.dumps({"token": (signed + b"." + _base64(signature)).decode(), "expires_in": 300}).encode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def skopeo(*words: str | os.PathLike[str]) -> bytes:
    """Run skopeo, which asks nobody whether it trusts an image and takes plain HTTP of us."""
    needs("skopeo")
    done = subprocess.run(["skopeo", "--insecure-policy", *words], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
