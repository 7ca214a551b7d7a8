"""Names of images, as Docker reads them."""

from __future__ import annotations

import pytest

from trivisor.core.errors import InvalidSpec
from trivisor.images.reference import Reference, normalise

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest", "familiar"),
    [
        ("debian", "docker.io", "library/debian", "latest", "", "debian:latest"),
        ("debian:12", "docker.io", "library/debian", "12", "", "debian:12"),
        ("docker.io/library/debian:12", "docker.io", "library/debian", "12", "", "debian:12"),
        ("index.docker.io/debian", "docker.io", "library/debian", "latest", "", "debian:latest"),
        ("docker.io/a/b", "docker.io", "a/b", "latest", "", "a/b:latest"),
        ("a/b/c:t", "docker.io", "a/b/c", "t", "", "a/b/c:t"),
        ("localhost/x", "localhost", "x", "latest", "", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000", "x", "latest", "", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/team/x:1.0", "127.0.0.1:5000", "team/x", "1.0", "", "127.0.0.1:5000/team/x:1.0"),
        ("[::1]:5000/x", "[::1]:5000", "x", "latest", "", "[::1]:5000/x:latest"),
        ("quay.io/a/b_c-d.e", "quay.io", "a/b_c-d.e", "latest", "", "quay.io/a/b_c-d.e:latest"),
        ("HOST/x", "HOST", "x", "latest", "", "HOST/x:latest"),
        (f"debian@{DIGEST}", "docker.io", "library/debian", "", DIGEST, f"debian@{DIGEST}"),
        (f"r.io/x:1@{DIGEST}", "r.io", "x", "1", DIGEST, f"r.io/x:1@{DIGEST}"),
        ("docker.io/library/a.b/c", "docker.io", "library/a.b/c", "latest", "", "library/a.b/c:latest"),
    ],
)
def test_parts(text: str, registry: str, repository: str, tag: str, digest: str, familiar: str) -> None:
    found = Reference.parse(text)
    assert (found.registry, found.repository, found.tag, found.digest) == (registry, repository, tag, digest)
    assert found.familiar == normalise(text) == str(found) == familiar
    assert found.canonical.startswith(f"{registry}/{repository}")
    for spelling in (found.familiar, found.canonical):
        assert Reference.parse(spelling) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "/", "Debian", "a//b", "a/", "/a", "a:", "a b", "a:b:c", "a\n", "../a", "a..b", "-a", "a/Debian", "a:" + "x" * 129),
        *("x" * 256, "a@", "a@sha256:12", "a@md5:" + "0" * 32, f"a@{DIGEST}@{DIGEST}", f"@{DIGEST}", "-h.io/a", "h.io:port/a", "h.io:1/"),
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidSpec) as raised:
        Reference.parse(text)
    assert raised.value.hint
