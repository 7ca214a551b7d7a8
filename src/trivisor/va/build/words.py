"""The words of a Containerfile: how they are split, unquoted and expanded (Dockerfile reference, "Environment replacement").

Of shells it has quotes, escapes and `$name`, `${name}` with the modifiers `:-` `:+` `:?` `-` `+` `?`; nothing is run. What is in single
quotes is not expanded. What a variable holds is never split or expanded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Lookup = Mapping[str, str]
_NAME_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_NAME = _NAME_FIRST | frozenset("0123456789")
MAX = 1 << 20
"""Characters that an expansion may come to."""


class WordError(ValueError):
    """A word that cannot be read."""


def split(text: str, escape: str = "\\") -> list[str]:
    """Split `text` at white space outside of quotes; quotes and escapes stay as they are. Raises WordError."""
    words: list[str] = []
    word = ""
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        if char == escape and quote != "'" and at + 1 < len(text):
            word += text[at : at + 2]
            at += 2
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char.isspace():
            if word:
                words.append(word)
            word = ""
            at += 1
            continue
        word += char
        at += 1
    if quote:
        raise WordError(f"a {quote} is never closed")
    return [*words, word] if word else words


def expand(text: str, values: Lookup, escape: str = "\\", *, quotes: bool = True) -> str:
    """Return `text` with variables replaced by `values` (an unknown one by nothing) and, with `quotes`, quotes and escapes taken away.

    Raises WordError.
    """
    return _Expansion(text, values, escape, quotes).run()


def unquote(text: str, escape: str = "\\") -> str:
    """Return `text` without its quotes and escapes; nothing is expanded. Raises WordError."""
    return _Expansion(text, None, escape, True).run()


class _Expansion:
    def __init__(self, text: str, values: Lookup | None, escape: str, quotes: bool) -> None:
        self._text = text
        self._values = values
        self._escape = escape
        self._quotes = quotes
        self._at = 0

    def run(self) -> str:
        return self._until("")

    def _until(self, stop: str) -> str:
        """Read on until the character `stop`, which is consumed, or the end if it is empty."""
        out: list[str] = []
        size = 0
        while self._at < len(self._text):
            char = self._text[self._at]
            if stop and char == stop:
                self._at += 1
                return "".join(out)
            piece = self._piece(char)
            out.append(piece)
            size += len(piece)
            if size > MAX:
                raise WordError(f"it comes to more than {MAX} characters")
        if stop:
            raise WordError(f"a {stop} is missing")
        return "".join(out)

    def _piece(self, char: str) -> str:
        if char == self._escape:
            return self._escaped(in_quotes=False)
        if char == "'" and self._quotes:
            return self._single()
        if char == '"' and self._quotes:
            return self._double()
        if char == "$" and self._values is not None:
            return self._variable(self._values)
        self._at += 1
        return char

    def _escaped(self, *, in_quotes: bool) -> str:
        """An escape takes the meaning from the next character; in double quotes only from those that have one."""
        after = self._text[self._at + 1 : self._at + 2]
        if not self._quotes:
            # A here-document: only what would be expanded is escaped.
            taken = after if after in ("$", self._escape) else self._escape + after
        elif not after or (in_quotes and after not in ('"', "$", self._escape)):
            taken = self._escape + after
        else:
            taken = after
        self._at += 1 + len(after)
        return taken

    def _single(self) -> str:
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise WordError("a ' is never closed")
        inner = self._text[self._at + 1 : end]
        self._at = end + 1
        return inner

    def _double(self) -> str:
        self._at += 1
        out: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == '"':
                self._at += 1
                return "".join(out)
            if char == self._escape:
                out.append(self._escaped(in_quotes=True))
            elif char == "$" and self._values is not None:
                out.append(self._variable(self._values))
            else:
                out.append(char)
                self._at += 1
        raise WordError('a " is never closed')

    def _variable(self, values: Lookup) -> str:
        self._at += 1
        if self._text[self._at : self._at + 1] == "{":
            self._at += 1
            return self._braced(values)
        name = self._name()
        return values.get(name, "") if name else "$"

    def _name(self) -> str:
        start = self._at
        if start < len(self._text) and self._text[start] in _NAME_FIRST:
            while self._at < len(self._text) and self._text[self._at] in _NAME:
                self._at += 1
        return self._text[start : self._at]

    def _braced(self, values: Lookup) -> str:
        name = self._name()
        if not name:
            raise WordError("${ is not followed by a name")
        char = self._text[self._at : self._at + 1]
        if char == "}":
            self._at += 1
            return values.get(name, "")
        colon = char == ":"
        self._at += colon
        how = self._text[self._at : self._at + 1]
        if not how or how not in _MODIFIERS:
            raise WordError(f"${{{name}{char} has no meaning here; there are :- :+ :? - + ?")
        self._at += 1
        other = self._until("}")
        value = values.get(name)
        return _MODIFIERS[how](name, value, other, bool(value) if colon else value is not None)


def _required(name: str, value: str | None, other: str, there: bool) -> str:
    if not there:
        raise WordError(f"{name}: {other or 'it has no value'}")
    return value or ""


_MODIFIERS: dict[str, Callable[[str, str | None, str, bool], str]] = {
    "-": lambda _, value, other, there: (value or "") if there else other,
    "+": lambda _, __, other, there: other if there else "",
    "?": _required,
}
