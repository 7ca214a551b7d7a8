"""Names of images as Docker writes them: `[host[:port]/]repository[:tag][@digest]`.

The grammar is that of distribution/reference: what stands before the first slash is a registry if it has a dot, a colon or a
capital letter, or is `localhost`; else the registry is docker.io, where a repository of one word lies under `library/`.
Without a tag and a digest the tag is `latest`. Two spellings of one name are one `Reference`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trivisor.core.errors import InvalidSpec

REGISTRY = "docker.io"
_LIBRARY = "library/"
_ALIASES = {"index.docker.io": REGISTRY}
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX = 255
"""Characters of registry and repository together."""


@dataclass(frozen=True)
class Reference:
    """One name of an image. `tag` is empty only where there is a `digest`, `digest` unless it was given."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read `text`. Raises InvalidSpec with what is wrong with it."""
        if "://" in text:
            raise _bad(text, f"it is no address: write {text.partition('://')[2][:200]}")
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise _bad(text, "its digest is not sha256: and 64 hexadecimal digits")
        slash, colon = rest.rfind("/"), rest.rfind(":")
        name, tag = (rest[:colon], rest[colon + 1 :]) if colon > slash else (rest, "")
        if colon > slash and not _TAG.fullmatch(tag):
            raise _bad(text, "its tag may have letters, digits, _ . and -, 128 at most")
        if len(name) > MAX:
            raise _bad(text, f"it is longer than {MAX} characters")
        registry, repository = _split(name)
        if not _HOST.fullmatch(registry):
            raise _bad(text, "its registry is not a host name")
        if not _REPOSITORY.fullmatch(repository):
            raise _bad(text, "use name or name:tag, the name in a-z, 0-9 and single . _ - / between them")
        return cls(registry, repository, tag or ("" if digest else "latest"), digest)

    @property
    def familiar(self) -> str:
        """As people write it: without the registry and `library/` where they are the default, with the tag."""
        name = f"{self.registry}/{self.repository}"
        if self.registry == REGISTRY:
            name = self.repository
            short = name.removeprefix(_LIBRARY)
            if _split(short) == (self.registry, self.repository):
                name = short
        return name + self._suffix

    @property
    def canonical(self) -> str:
        """In full, nothing left to defaults."""
        return f"{self.registry}/{self.repository}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        return self.familiar


def normalise(reference: str) -> str:
    """Return the familiar form of `reference`, with its tag. Raises InvalidSpec."""
    return Reference.parse(reference).familiar


def _split(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and (first == "localhost" or first != first.lower() or "." in first or ":" in first):
        registry, repository = _ALIASES.get(first.lower(), first), rest
    else:
        registry, repository = REGISTRY, name
    if registry == REGISTRY and "/" not in repository:
        repository = _LIBRARY + repository
    return registry, repository


def _bad(text: str, why: str) -> InvalidSpec:
    return InvalidSpec(f"{text[:80]!r} is not the name of an image", hint=why)
