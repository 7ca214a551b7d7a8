"""Stages: how they are found, what they need of each other, and what cannot be."""

from __future__ import annotations

import pytest

from trivisor.core.errors import RecipeError
from trivisor.va.build.parse import parse
from trivisor.va.build.recipe import Recipe, pairs, recipe


def made(text: str, **arguments: str) -> Recipe:
    return recipe(parse(text), arguments)


def test_stages() -> None:
    found = made("ARG V=1\nFROM --platform=linux/amd64 debian:$V AS base\nRUN a\nFROM base\nFROM scratch AS c\nCOPY --from=1 /a /a", V="2")
    assert [(stage.name, stage.base, stage.platform, sorted(stage.needs)) for stage in found.stages] == [
        ("base", "debian:2", "linux/amd64", []),
        ("", 0, "", [0]),
        ("c", "scratch", "", [1]),
    ]
    assert found.arguments == {"V": "2"}
    assert [stage.index for stage in found.needed(found.stage())] == [0, 1, 2]


def test_only_what_the_target_needs() -> None:
    found = made("FROM a AS one\nFROM b AS two\nFROM c AS three\nCOPY --from=ONE / /\nFROM d\nRUN --mount=from=two,target=/x true")
    assert [stage.name for stage in found.needed(found.stage("three"))] == ["one", "three"]
    assert {stage.name for stage in found.needed(found.stage())} == {"two", ""}
    assert found.stage("1").name == "two"


def test_a_later_stage_may_be_needed() -> None:
    found = made("FROM a\nCOPY --from=later /x /x\nFROM b AS later")
    assert [stage.index for stage in found.order()] == [1, 0]


def test_an_image_is_no_stage() -> None:
    assert made("FROM a\nCOPY --from=nginx:1 /x /x").stages[0].needs == frozenset()
    # FROM looks back only: this is the image "later".
    assert made("FROM later\nFROM b AS later").stages[0].base == "later"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("RUN a\nFROM b", 1, "before the first FROM"),
        ("ARG a", 1, "no FROM"),
        ("FROM a AS x\nFROM b AS X", 2, "two stages"),
        ("FROM a AS x\nCOPY --from=y /a /a\nFROM b AS y\nCOPY --from=x /a /a", 1, "in a circle"),
        ("FROM a AS x\nCOPY --from=x /a /a", 1, "in a circle"),
        ("FROM a\nCOPY --from=3 /a /a", 2, "no stage 3"),
        ("FROM a b", 1, "FROM image AS name"),
        ("FROM a AS 1x", 1, "no name of a stage"),
        ("FROM $none", 1, "names no image"),
        ("FROM a\nRUN --mount=type=x,target=/ b", 2, "no type"),
    ],
)
def test_what_no_build_can_do(text: str, line: int, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        made(text)
    assert caught.value.line == line
    assert says in f"{caught.value} {caught.value.hint}"


def test_no_such_target() -> None:
    with pytest.raises(RecipeError, match="no stage x") as caught:
        made("FROM a AS one\nFROM b").stage("x")
    assert caught.value.hint == "there are one, 1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ENV a=1 b='2 3' c=$v", [("a", "1"), ("b", "2 3"), ("c", "V")]),
        ("ENV a the rest $v", [("a", "the rest V")]),
        ("ENV a=$b b=2", [("a", ""), ("b", "2")]),
        ('LABEL "a b"=c "$v"=d', [("a b", "c"), ("V", "d")]),
    ],
)
def test_names_and_values(text: str, expected: list[tuple[str, str]]) -> None:
    file = parse(text)
    assert pairs(file, file.instructions[0], {"v": "V"}) == expected


@pytest.mark.parametrize("text", ["ENV a", "ENV a=1 b", "ENV =1", "LABEL a='"])
def test_no_names_and_values(text: str) -> None:
    file = parse(text)
    with pytest.raises(RecipeError):
        pairs(file, file.instructions[0], {})
