"""XML from strangers, as a small tree: no document type, so no entities and nothing from elsewhere; bounded in size, depth and number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from trivisor.core.errors import ImageError

MAX = 4 << 20
"""Bytes of a document."""
MAX_ELEMENTS = 20_000
MAX_DEPTH = 32
_SEPARATOR = " "
"""Between namespace and name: neither has one."""


@dataclass
class Element:
    """One element: `name` is "namespace name", as those of its attributes are; `text` is what stands in it beside its children."""

    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    @property
    def local(self) -> str:
        """Its name without the namespace."""
        return self.name.rpartition(_SEPARATOR)[2]

    def all(self, name: str) -> Iterator[Element]:
        """Return its children of that name, in order."""
        return (child for child in self.children if child.name == name)

    def get(self, name: str, default: str = "") -> str:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def value(self, name: str) -> str:
        """Return the text of the first child of that name, "" if there is none."""
        return next((child.text.strip() for child in self.all(name)), "")


class _Builder:
    def __init__(self, what: str) -> None:
        self._what = what
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_ELEMENTS or len(self._open) >= MAX_DEPTH:
            raise ImageError(f"{self._what}: it has too many elements, or too deep ones")
        element = Element(name, attributes)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def end(self, _name: str) -> None:
        self._open.pop()

    def data(self, text: str) -> None:
        if self._open:
            self._open[-1].text += text

    def refuse(self, *_: object) -> None:
        raise ImageError(
            f"{self._what}: it has a document type, with which it could name other files", hint="a package has none: remove it"
        )


def parse(data: bytes, what: str) -> Element:
    """Return the document's root; `what` begins each message. Raises ImageError."""
    if len(data) > MAX:
        raise ImageError(f"{what}: over {MAX} bytes")
    builder = _Builder(what)
    parser = expat.ParserCreate(namespace_separator=_SEPARATOR)
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = builder.start, builder.end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.UnparsedEntityDeclHandler = builder.refuse
    parser.ExternalEntityRefHandler = parser.NotationDeclHandler = builder.refuse  # type: ignore[assignment]
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ImageError(f"{what}: not XML: {error}") from error
    except (UnicodeError, LookupError, ValueError) as error:
        raise ImageError(f"{what}: its text cannot be read: {error}") from error
    if builder.root is None:
        raise ImageError(f"{what}: there is nothing in it")
    return builder.root
