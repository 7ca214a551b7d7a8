"""What is public is documented: exported names, modules, and every verb of the command line."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import click
import pytest

import trivisor
from trivisor.cli.main import cli
from trivisor.cli.table import ALIASES, VERBS

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "trivisor").rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", trivisor.__all__)
def test_exported_name_has_a_docstring(name: str) -> None:
    exported = getattr(trivisor, name)
    if inspect.isclass(exported) or inspect.isfunction(exported):
        assert inspect.getdoc(exported)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_public_classes_have_docstrings(path: Path) -> None:
    missing = [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not missing


@pytest.mark.parametrize("name", VERBS)
def test_table_of_verbs_is_true(name: str) -> None:
    """The table's line of help is the docstring's first; the command bears the verb's name."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.help is not None
    assert command.name == name
    assert command.help.split("\n")[0] == VERBS[name].help


@pytest.mark.parametrize("name", VERBS)
def test_verb_is_documented(name: str) -> None:
    """docs/cli.md has a section for the verb, and names each of its options."""
    text = (ROOT / "docs" / "cli.md").read_text()
    section = re.search(rf"^## {name}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md has no section for {name}"
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("--") and option not in ("--home", "--json", "--help"):
                assert option in section[0], f"docs/cli.md does not say what {name} {option} is"
    if isinstance(command, click.Group):
        for sub in command.commands:
            assert f"{name} {sub}" in section[0]


def test_aliases_are_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for alias, verb in ALIASES.items():
        assert f"`{alias}`" in text
        assert verb in VERBS


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"
