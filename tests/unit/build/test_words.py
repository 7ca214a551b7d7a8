"""Words of a Containerfile: splitting, quotes, expansion; what `.dockerignore` leaves out; mounts of a RUN."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.va.build import ignore
from trivisor.va.build.mounts import Mount, parse_mount
from trivisor.va.build.words import WordError, expand, split, unquote

VALUES = {"a": "1", "empty": "", "long": "x y"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$a ${a} $b", "1 1 "),
        ("${b:-$a}", "1"),
        ("${empty:-x}${empty-x}", "x"),
        ("${a:+set}${b:+set}${empty:+set}${empty+set}", "setset"),
        ("'$a'", "$a"),
        ("\"$a 'x'\"", "1 'x'"),
        (r"\$a \"", '$a "'),
        (r'"\$a \b"', r"$a \b"),
        ("$long", "x y"),
        ("$", "$"),
        ("$1", "$1"),
        ("${b:-${a}}}", "1}"),
        ("\\", "\\"),
    ],
)
def test_expansion(text: str, expected: str) -> None:
    assert expand(text, VALUES) == expected


@pytest.mark.parametrize("text", ["${", "${}", "${a", "${a/b/c}", "'", '"', "${b:?must be}", "${b?}"])
def test_what_cannot_be_expanded(text: str) -> None:
    with pytest.raises(WordError):
        expand(text, VALUES)


def test_what_is_expanded_is_bounded() -> None:
    with pytest.raises(WordError, match="more than"):
        expand("$a" * 40, {"a": "x" * 100_000})


def test_in_a_here_document_quotes_mean_nothing() -> None:
    assert expand("'$a' \"x\" \\$a \\n", VALUES, quotes=False) == "'1' \"x\" $a \\n"


def test_words() -> None:
    assert split("a 'b c' d\\ e \"f g\"h") == ["a", "'b c'", "d\\ e", '"f g"h']
    assert unquote("'b c'\"d\"\\ e") == "b cd e"
    with pytest.raises(WordError):
        split("'a")


@given(st.text(max_size=100))
def test_no_variable_no_change(text: str) -> None:
    if not set(text) & set("\\'\"$"):
        assert expand(text, {}) == text


@pytest.mark.parametrize(
    ("lines", "out", "kept"),
    [
        (["*.md"], ["a.md"], ["d/a.md", "amd"]),
        (["**/*.md"], ["a.md", "d/e/a.md"], ["a.mdx"]),
        (["d"], ["d", "d/x", "d/e/f"], ["e/d", "dd"]),
        (["/d/"], ["d/x"], ["e/d"]),
        (["*", "!a", "!d/e"], ["b", "d/f"], ["a", "d/e", "d/e/f"]),
        (["d/?[a-c]"], ["d/xb"], ["d/xd", "d/b"]),
        (["d/**"], ["d/x/y"], ["e"]),
        (["[^a]b"], ["cb"], ["ab", "/b"]),
        ([r"\*"], ["*"], ["a"]),
        ([".", "!."], [], ["a"]),
    ],
)
def test_ignored(lines: list[str], out: list[str], kept: list[str]) -> None:
    found = ignore.patterns(lines)
    assert [path for path in [*out, *kept] if found(path)] == out


def test_an_ignore_file() -> None:
    found = ignore.read("# a comment\n\n  *.o \n!b.o\n")
    assert found.takes_back
    assert (found("a.o"), found("b.o"), found("# a comment")) == (True, False, False)
    with pytest.raises(ValueError, match="closed"):
        ignore.read("[a")


def test_mounts() -> None:
    assert parse_mount("type=cache,target=/c") == Mount("cache", "/c", id="/c")
    assert parse_mount("type=cache,target=/c,id=x,ro,sharing=locked,mode=0700,uid=5").readonly
    assert parse_mount("target=/b,source=x,from=stage") == Mount("bind", "/b", source="x", source_stage="stage", readonly=True, id="b")
    assert not parse_mount("type=bind,dst=/b,rw").readonly
    assert not parse_mount("type=bind,dst=/b,ro=false").readonly
    assert parse_mount("type=tmpfs,target=/t,size=1M").size == 1 << 20
    assert parse_mount("type=secret,id=key").target == "/run/secrets/key"
    assert parse_mount("type=secret,id=key,env=KEY").target == ""


@pytest.mark.parametrize(
    "text",
    [
        "type=ssh",
        "type=cache",
        "type=cache,target=/x,size=1",
        "type=secret",
        "type=cache,target=/x,sharing=no",
        "type=tmpfs,target=/t,size=x",
    ]
    + ["type=cache,target=/x,mode=9", "type=cache,target=/x,uid=-1", "type=bind,target=/x,rw=perhaps"],
)
def test_mounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_mount(text)
