"""Containerfiles read: directives, logical lines, here-documents, flags, JSON arrays. Nothing is expanded or run here.

The syntax is that of the Dockerfile reference. What no build could do is RecipeError, which names the file and the line.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field, replace

from trivisor.core.errors import RecipeError
from trivisor.core.units import MIB
from trivisor.va.build.words import WordError, split, unquote

MAX_SIZE = MIB
"""Bytes of a Containerfile."""

FLAGS: dict[str, frozenset[str]] = {
    "ADD": frozenset({"chown", "chmod", "checksum", "exclude", "link"}),
    "ARG": frozenset(),
    "CMD": frozenset(),
    "COPY": frozenset({"from", "chown", "chmod", "exclude", "link"}),
    "ENTRYPOINT": frozenset(),
    "ENV": frozenset(),
    "EXPOSE": frozenset(),
    "FROM": frozenset({"platform"}),
    "HEALTHCHECK": frozenset({"interval", "timeout", "start-period", "start-interval", "retries"}),
    "LABEL": frozenset(),
    "MAINTAINER": frozenset(),
    "ONBUILD": frozenset(),
    "RUN": frozenset({"mount", "network"}),
    "SHELL": frozenset(),
    "STOPSIGNAL": frozenset(),
    "USER": frozenset(),
    "VOLUME": frozenset(),
    "WORKDIR": frozenset(),
}
"""The instructions, and the flags that each takes."""

_HEREDOCS = ("RUN", "COPY", "ADD")
_JSON = ("RUN", "CMD", "ENTRYPOINT", "COPY", "ADD", "VOLUME", "SHELL")
_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.+?)\s*$")
_HEREDOC = re.compile(r"(\d*)<<(-?)([^<]+)")
_FLAG = re.compile(r"--([a-z-]+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Heredoc:
    """A file in the recipe itself. `expand` says whether variables in it mean something."""

    name: str
    text: str
    expand: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction as it was written."""

    name: str
    """In capitals, one of FLAGS."""
    line: int
    """Of its first word, from 1."""
    text: str
    """What follows its flags, on one line."""
    flags: tuple[tuple[str, str], ...] = ()
    words: tuple[str, ...] | None = None
    """Its JSON array, if it is one."""
    heredocs: tuple[Heredoc, ...] = ()

    def flag(self, name: str, default: str = "") -> str:
        """Return the last value that was given for the flag."""
        return next((value for key, value in reversed(self.flags) if key == name), default)


@dataclass(frozen=True)
class Containerfile:
    """What a Containerfile says, in order. `escape` is its escape character."""

    name: str
    instructions: tuple[Instruction, ...]
    escape: str = "\\"
    directives: dict[str, str] = field(default_factory=dict)


def parse(text: str, name: str = "Containerfile") -> Containerfile:
    """Read a Containerfile; `name` is what errors call it. Raises RecipeError."""
    if len(text) > MAX_SIZE:
        raise RecipeError(name, 1, f"it is larger than {MAX_SIZE} characters")
    reader = _Reader(text, name)
    directives = reader.directives()
    escape = directives.get("escape", "\\")
    if escape not in ("\\", "`"):
        raise RecipeError(name, 1, f"the escape directive is {escape!r}", hint="it may be \\ or `")
    instructions = []
    while (found := reader.instruction(escape)) is not None:
        instructions.append(found)
    if not instructions:
        raise RecipeError(name, 1, "there is no instruction in it", hint="begin with FROM, for example `FROM debian`")
    return Containerfile(name, tuple(instructions), escape, directives)


def triggered(text: str, line: int, name: str, escape: str = "\\") -> Instruction:
    """Read the instruction that an ONBUILD keeps for later. Raises RecipeError."""
    found = _instruction(name, line, text, escape)
    if found.name in ("ONBUILD", "FROM", "MAINTAINER"):
        raise RecipeError(name, line, f"ONBUILD {found.name} is not possible")
    return found


class _Reader:
    def __init__(self, text: str, name: str) -> None:
        self._lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        self._name = name
        self._at = 0

    def directives(self) -> dict[str, str]:
        """Read those at the very top; the first line that is none ends them."""
        found: dict[str, str] = {}
        for number, line in enumerate(self._lines, 1):
            match = _DIRECTIVE.fullmatch(line.strip())
            if match is None or (key := match[1].lower()) not in ("syntax", "escape", "check"):
                break
            if key in found:
                raise RecipeError(self._name, number, f"the directive {key} is there twice")
            found[key] = match[2]
            self._at = number
        return found

    def instruction(self, escape: str) -> Instruction | None:
        """Read the next instruction, and here-documents behind it; None at the end."""
        text, line = "", 0
        while not text:  # an escape alone on its line is one, too
            self._skip()
            if self._at >= len(self._lines):
                return None
            line = self._at + 1
            text = self._logical(escape)
        found = _instruction(self._name, line, text, escape)
        if found.name not in _HEREDOCS or found.words is not None or "<<" not in found.text:
            return found
        return replace(found, heredocs=tuple(self._heredoc(line, *opening) for opening in _openings(found, self._name, escape)))

    def _skip(self) -> None:
        """Pass over blank lines and comments, between instructions and inside of them."""
        while self._at < len(self._lines) and (not (text := self._lines[self._at].strip()) or text.startswith("#")):
            self._at += 1

    def _logical(self, escape: str) -> str:
        """Join the lines that an escape at the end continues."""
        ending = re.compile(rf"(?<!{re.escape(escape)}){re.escape(escape)}[ \t]*$")
        text = ""
        while self._at < len(self._lines):
            body = self._lines[self._at]
            self._at += 1
            cut = ending.search(body)
            if cut is None:
                return (text + body).strip()
            text += body[: cut.start()]
            self._skip()
        return text.strip()

    def _heredoc(self, line: int, dash: bool, name: str, expand: bool) -> Heredoc:
        body: list[str] = []
        while self._at < len(self._lines):
            text = self._lines[self._at].lstrip("\t") if dash else self._lines[self._at]
            self._at += 1
            if text == name:
                return Heredoc(name, "".join(f"{part}\n" for part in body), expand)
            body.append(text)
        raise RecipeError(self._name, line, f"the here-document {name} never ends", hint=f"end it with a line that is {name} alone")


def _openings(found: Instruction, file: str, escape: str) -> list[tuple[bool, str, bool]]:
    """Return of each here-document that the line opens: whether tabs go, its name, whether it is expanded."""
    try:
        words = split(found.text, escape)
    except WordError:
        return []  # quotes of a shell that we do not read
    openings = []
    for word in words:
        if (match := _HEREDOC.fullmatch(word)) is not None:
            raw = match[3]
            try:
                name = unquote(raw, escape)
            except WordError as error:
                raise RecipeError(file, found.line, f"the here-document {raw}: {error}") from error
            openings.append((bool(match[2]), name, name == raw))
    return openings


def _instruction(file: str, line: int, text: str, escape: str) -> Instruction:
    keyword, *others = text.split(maxsplit=1)
    name = keyword.upper()
    if name not in FLAGS:
        near = difflib.get_close_matches(name, FLAGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {' '.join(FLAGS)}"
        raise RecipeError(file, line, f"{keyword[:40]!r} is no instruction", hint=hint)
    flags, rest = _flags(file, line, name, "".join(others).strip(), escape)
    if not rest:
        raise RecipeError(file, line, f"{name} says nothing")
    return Instruction(name, line, rest, flags, _array(file, line, name, rest))


def _flags(file: str, line: int, name: str, rest: str, escape: str) -> tuple[tuple[tuple[str, str], ...], str]:
    flags: list[tuple[str, str]] = []
    while rest.startswith("--"):
        end = _word_end(rest, escape)
        word, after = rest[:end], rest[end:].lstrip()
        if word == "--":
            return tuple(flags), after
        match = _FLAG.fullmatch(word)
        if match is None or match[1] not in FLAGS[name]:
            allowed = " ".join(f"--{flag}" for flag in sorted(FLAGS[name]))
            raise RecipeError(file, line, f"{name} takes no {word.partition('=')[0][:40]}", hint=f"it takes {allowed}" if allowed else "")
        if match[2] is None and match[1] != "link":
            raise RecipeError(file, line, f"--{match[1]} has no value", hint=f"write --{match[1]}=VALUE")
        try:
            flags.append((match[1], unquote(match[2] or "true", escape)))
        except WordError as error:
            raise RecipeError(file, line, f"--{match[1]}: {error}") from error
        rest = after
    return tuple(flags), rest


def _word_end(text: str, escape: str) -> int:
    quote = ""
    skip = False
    for at, char in enumerate(text):
        if skip:
            skip = False
        elif char == escape:
            skip = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char.isspace():
            return at
    return len(text)


def _array(file: str, line: int, name: str, text: str) -> tuple[str, ...] | None:
    """Read a JSON array of strings. What is none is words for a shell, unless it was clearly meant to be one."""
    if name not in _JSON:
        return None
    try:
        found = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError) as error:
        if _meant(text) or name == "SHELL":
            hint = 'strings stand in double quotes, with commas between: ["a", "b"]'
            raise RecipeError(file, line, f"a JSON array that cannot be read: {text[:60]}", hint=hint) from error
        found = None
    if found is None:
        if name == "SHELL":
            raise RecipeError(file, line, "SHELL takes a JSON array", hint='for example SHELL ["/bin/sh", "-c"]')
        return None
    if not isinstance(found, list) or not all(isinstance(word, str) and "\0" not in word for word in found):
        raise RecipeError(file, line, f"a JSON array of something else than strings: {text[:60]}")
    return tuple(found)


def _meant(text: str) -> bool:
    """Whether a text that is no JSON was meant as an array: `[ "$a" = b ] && ...` is a command."""
    return text.startswith(('["', "['")) or (text.startswith("[ ") and text.endswith("]") and "," in text)
