"""Containerfiles as text: lines, directives, here-documents, flags, arrays, and errors that name the line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivisor.core.errors import RecipeError
from trivisor.va.build.parse import FLAGS, Heredoc, parse, triggered


def one(text: str) -> tuple[str, str, tuple[str, ...] | None]:
    (found,) = parse(text).instructions
    return found.name, found.text, found.words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from debian", ("FROM", "debian", None)),
        ("RUN a \\\n b", ("RUN", "a  b", None)),
        ("RUN a \\  \n# a comment\n\n b", ("RUN", "a  b", None)),
        ("RUN a \\\\\n", ("RUN", "a \\\\", None)),
        ("  RUN\ta", ("RUN", "a", None)),
        ('CMD ["a", "b c"]', ("CMD", '["a", "b c"]', ("a", "b c"))),
        ("CMD []", ("CMD", "[]", ())),
        ('RUN [ "$x" = y ] && z', ("RUN", '[ "$x" = y ] && z', None)),
        ("COPY [a-c]* /x/", ("COPY", "[a-c]* /x/", None)),
        ("# escape=`\nRUN a `\n b\\", ("RUN", "a  b\\", None)),
        ("\ufeff# syntax=docker/dockerfile:1\r\nRUN a\r\n", ("RUN", "a", None)),
    ],
)
def test_an_instruction(text: str, expected: object) -> None:
    assert one(text) == expected


def test_lines_are_counted() -> None:
    found = parse("# a comment\n\nFROM x\nRUN a \\\n  b\n\nRUN <<E\nRUN c\nE\nUSER d\n")
    assert [(part.name, part.line) for part in found.instructions] == [("FROM", 3), ("RUN", 4), ("RUN", 7), ("USER", 10)]


def test_flags() -> None:
    (found,) = parse('COPY --from=a --chown=1:2 --link --chmod="755" -- --b /c').instructions
    assert found.flags == (("from", "a"), ("chown", "1:2"), ("link", "true"), ("chmod", "755"))
    assert found.text == "--b /c"
    assert found.flag("chown") == "1:2"
    assert found.flag("exclude") == ""


def test_here_documents() -> None:
    text = "RUN <<A cat <<-'B'\none\nA\n\ttwo $x\n\tB\nCOPY <<\"c d\" /x\nthree\nc d\nRUN echo $((1<<2))"
    found = parse(text).instructions
    assert found[0].heredocs == (Heredoc("A", "one\n", True), Heredoc("B", "two $x\n", False))
    assert found[1].heredocs == (Heredoc("c d", "three\n", False),)
    assert found[2].heredocs == ()


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("FROM a\nRUNN b", 2, "no instruction"),
        ("FROM a\nRUN", 2, "says nothing"),
        ('FROM a\n\nCMD ["a", b]', 3, "a JSON array"),
        ('CMD ["a", 1]', 1, "something else than strings"),
        ("SHELL /bin/sh", 1, "a JSON array"),
        ("RUN <<E\na", 1, "never ends"),
        ("COPY --frm=a b c", 1, "takes no --frm"),
        ("COPY --from a b", 1, "no value"),
        ("# escape=x\nFROM a", 1, "escape"),
        ("# escape=`\n# escape=`\nFROM a", 2, "twice"),
        ("\n# nothing\n", 1, "no instruction"),
        ("FROM a\n" + "x" * (1 << 20), 1, "larger"),
        ("CMD " + "[" * 100_000, 1, "says nothing"),
    ],
)
def test_what_no_build_can_do(text: str, line: int, says: str) -> None:
    if text.startswith("CMD [["):
        assert one(text)[2] is None  # a command, if a strange one
        return
    with pytest.raises(RecipeError, match=says) as caught:
        parse(text, "Containerfile")
    assert caught.value.line == line
    assert str(caught.value).startswith(f"Containerfile:{line}: ")


def test_a_hint_for_a_slip() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("FORM debian")
    assert caught.value.hint == "did you mean FROM?"


def test_triggers() -> None:
    assert triggered("RUN a", 3, "f").line == 3
    with pytest.raises(RecipeError, match="ONBUILD FROM"):
        triggered("FROM a", 3, "f")


@given(st.text(max_size=200), st.sampled_from(sorted(FLAGS)))
def test_any_text_is_read_or_refused(text: str, name: str) -> None:
    for whole in (text, f"{name} {text}", f"{name} --{text}", f"RUN <<{text}"):
        try:
            parse(whole)
        except RecipeError as error:
            assert error.line >= 1
