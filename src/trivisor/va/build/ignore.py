"""`.dockerignore`: what of a build's context no step sees (Dockerfile reference, ".dockerignore file").

Patterns are Go's filepath.Match with `**`, from the top of the context; a line that begins with `!` takes back. The last that matches wins.
A folder that is left out takes what is in it along, but for what a later `!` takes back.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_PATTERNS = 10_000


@dataclass(frozen=True)
class Ignore:
    """The patterns of a context, and the verdict on a path of it."""

    patterns: tuple[tuple[bool, re.Pattern[str]], ...] = ()

    def __call__(self, path: str) -> bool:
        """Say whether the relative path is left out; so is what lies in a folder that is."""
        parts = path.split("/")
        above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        left_out = False
        for kept, pattern in self.patterns:
            if left_out == kept and any(pattern.fullmatch(part) for part in above):
                left_out = not kept
        return left_out

    @property
    def takes_back(self) -> bool:
        """Whether something in a folder that is left out may be kept all the same."""
        return any(kept for kept, _ in self.patterns)


def read(text: str) -> Ignore:
    """Read the lines of a .dockerignore. Raises ValueError for a pattern that cannot be read."""
    lines = [line.strip() for line in text.removeprefix("\ufeff").split("\n") if not line.startswith("#")]
    return patterns([line for line in lines if line])


def patterns(lines: Sequence[str]) -> Ignore:
    """Return what the patterns leave out. Raises ValueError."""
    if len(lines) > MAX_PATTERNS:
        raise ValueError(f"there are more than {MAX_PATTERNS} patterns")
    found = []
    for line in lines:
        kept = line.startswith("!")
        pattern = posixpath.normpath(line.removeprefix("!").strip()).strip("/")
        if pattern not in ("", "."):
            found.append((kept, re.compile(regex(pattern), re.DOTALL)))
    return Ignore(tuple(found))


def regex(pattern: str) -> str:
    """Return Go's filepath.Match pattern, and `**` for any number of folders, as a regular expression. Raises ValueError."""
    out = ""
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**/", at):
            out += "(?:.*/)?"
            at += 3
        elif pattern.startswith("**", at):
            out += ".*"
            at += 2
        elif char == "*":
            out += "[^/]*"
            at += 1
        elif char == "?":
            out += "[^/]"
            at += 1
        elif char == "[":
            end = pattern.find("]", at + 2)
            if end < 0:
                raise ValueError(f"the [ of {pattern!r} is never closed")
            inner = pattern[at + 1 : end]
            negated = inner.startswith("^")
            out += "[" + ("^/" if negated else "") + re.sub(r"[\[\]&~|^\\]", lambda m: "\\" + m[0], inner[negated:]) + "]"
            at = end + 1
        elif char == "\\" and at + 1 < len(pattern):
            out += re.escape(pattern[at + 1])
            at += 2
        else:
            out += re.escape(char)
            at += 1
    try:
        re.compile(out)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from error
    return out
