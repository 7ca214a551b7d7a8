"""How a machine's network is shaped: values of a Spec, and the forms in which people write them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import KIB, parse_duration, parse_size

MIN_RATE = KIB
MAX_LATENCY = 60.0
MAX_ALLOWED = 256
DNS = "dns"
_TARGET = re.compile(r"([0-9.]{7,15}(?:/\d{1,2})?)(?::(\d{1,5})(?:-(\d{1,5}))?)?", re.ASCII)

_NAMED = re.compile(r"(\*\.)?([^*:/\s]+)(?::(\d{1,5})(?:-(\d{1,5}))?)?(/tcp)?", re.ASCII)
_LABELS = re.compile(r"(?:[a-z0-9_-]{1,63}\.)+[a-z0-9_-]{1,63}", re.ASCII)
_NAME_LENGTH = 250


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well a machine is connected to all others. Each part may be left as it is without."""

    rate_in: int | None = None
    """Bytes a second that reach it at most; what is more waits in a queue of a tenth of a second."""
    rate_out: int | None = None
    """Bytes a second that it may send, one second's worth of them at once; what is more is dropped."""
    latency: float = 0
    """Seconds added to each round trip: what comes to it waits that long."""
    loss: float = 0
    """The share of packets that is lost, either way: from 0 to 1."""

    def __bool__(self) -> bool:
        return self != Shape()


def shape(wish: Any) -> Shape:
    """Return the Shape in `wish`: one, or a mapping such as {"rate_in": "1M", "latency": "50ms"}. Raises InvalidSpec."""
    if isinstance(wish, Shape):
        wish = msgspec.structs.asdict(wish)
    if not isinstance(wish, Mapping) or not all(isinstance(key, str) for key in wish):
        raise InvalidSpec(f"shape must map what is shaped to how, not {wish!r}", hint='for example {"latency": "50ms"}')
    unknown = set(wish) - set(Shape.__struct_fields__)
    if unknown:
        raise InvalidSpec(f"a shape has no {', '.join(sorted(unknown))}", hint=f"it has {', '.join(Shape.__struct_fields__)}")
    given = {key: value for key, value in wish.items() if value is not None}
    made: dict[str, Any] = {}
    for field in ("rate_in", "rate_out"):
        if field in given:
            made[field] = parse_size(given[field], field)
            if made[field] < MIN_RATE:
                raise InvalidSpec(f"{field} must be at least {MIN_RATE} bytes a second, not {given[field]!r}", hint="cut it off instead")
    latency = given.get("latency", 0)
    made["latency"] = 0 if latency == 0 and not isinstance(latency, bool) else parse_duration(latency, "latency")
    if made["latency"] > MAX_LATENCY:
        raise InvalidSpec(f"latency must be at most {MAX_LATENCY:g} s, not {latency!r}")
    loss = given.get("loss", 0)
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 <= loss <= 1:
        raise InvalidSpec(f"loss must be from 0 to 1, not {loss!r}", hint="0.05 loses one packet in twenty")
    return Shape(loss=float(loss), **made)


class Egress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a machine may begin to talk to, and nothing else; it answers whoever reaches it all the same."""

    allow: tuple[str, ...] = ()
    """"dns": its resolvers; addresses with or without ports, such as "192.0.2.0/24", "192.0.2.7:443", "0.0.0.0/0:1024-2047"; or names
    (Name), such as "pypi.example", "*.example.org:443", "git.example.org:22/tcp"."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The addresses that are allowed."""
        return tuple(Target.parse(line) for line in self.allow if line != DNS and not Name.like(line))

    @property
    def names(self) -> tuple[Name, ...]:
        """The names that are allowed."""
        return tuple(Name.parse(line) for line in self.allow if line != DNS and Name.like(line))


def egress(wish: Any) -> Egress:
    """Return the Egress in `wish`: one, a mapping, or what it allows: a string or several. Raises InvalidSpec."""
    if isinstance(wish, Egress):
        wish = wish.allow
    elif isinstance(wish, Mapping):
        if set(wish) - {"allow"}:
            raise InvalidSpec(f"egress is {wish!r}, and has nothing but allow", hint='for example {"allow": ["192.0.2.0/24:443"]}')
        wish = wish.get("allow", ())
    names = [wish] if isinstance(wish, str) else wish
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise InvalidSpec(
            f"egress must say what is allowed, not {wish!r}", hint='for example ["dns", "192.0.2.0/24:443"]; [] allows nothing'
        )
    if len(names) > MAX_ALLOWED:
        raise InvalidSpec(f"egress may allow {MAX_ALLOWED} things, not {len(names)}")
    return Egress(tuple(dict.fromkeys(_allowed(name) for name in names)))


def _allowed(line: str) -> str:
    if line == DNS:
        return line
    return str(Name.parse(line) if Name.like(line) else Target.parse(line))


@dataclass(frozen=True)
class Target:
    """Addresses that a machine may talk to, and their ports, the first and the last; None: every protocol there is."""

    network: str
    ports: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a line of Egress.allow means. Raises InvalidSpec."""
        hint = "such as 192.0.2.0/24, 192.0.2.7:443 or 0.0.0.0/0:1024-2047; machines have no IPv6"
        match = _TARGET.fullmatch(text)
        if not match:
            raise InvalidSpec(f"egress {text!r} is no range of IPv4 addresses", hint=hint)
        try:
            network = str(ipaddress.IPv4Network(match[1]))
        except ValueError as error:
            raise InvalidSpec(f"egress {text!r} is no range of IPv4 addresses: {error}", hint=hint) from error
        if match[2] is None:
            return cls(network)
        first, last = int(match[2]), int(match[3] or match[2])
        if not 1 <= first <= last <= 65535:
            raise InvalidSpec(f"egress {text!r} has no range of ports from 1 to 65535", hint=hint)
        return cls(network, (first, last))

    def __str__(self) -> str:
        if self.ports is None:
            return self.network
        first, last = self.ports
        return f"{self.network}:{first}" if first == last else f"{self.network}:{first}-{last}"


@dataclass(frozen=True)
class Name:
    """A name that a machine may talk to, or with "*." before it all names beneath that one, and their ports.

    What is said there is TLS or HTTP/1, whose own name for the server is looked at; `plain`: anything, to the addresses that the name has.
    """

    name: str
    ports: tuple[int, int] = (1, 65535)
    plain: bool = False

    @staticmethod
    def like(text: str) -> bool:
        """Whether a line of Egress.allow is one of these rather than an address."""
        return not text.isascii() or any(char.isalpha() or char == "*" for char in text.removesuffix("/tcp"))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a line of Egress.allow means. Raises InvalidSpec."""
        hint = "such as pypi.example, *.example.org:443 or git.example.org:22/tcp"
        match = _NAMED.fullmatch(text)
        if not match:
            raise InvalidSpec(f"egress {text!r} is no name with ports", hint=hint)
        star, name, first, last, plain = match.groups()
        try:
            name = name.rstrip(".").encode("idna").decode("ascii").lower()
        except UnicodeError as error:
            raise InvalidSpec(f"egress {text!r} has no name in it: {error}", hint=hint) from error
        if len(name) > _NAME_LENGTH or not _LABELS.fullmatch(name) or name.rpartition(".")[2].isdecimal():
            raise InvalidSpec(f"egress {text!r} is no name of a host: labels of letters, digits and hyphens, two at least", hint=hint)
        if plain and first is None:
            raise InvalidSpec(f"egress {text!r} allows every port unseen", hint="name the port: git.example.org:22/tcp")
        ports = (int(first or 1), int(last or first or 65535))
        if not 1 <= ports[0] <= ports[1] <= 65535:
            raise InvalidSpec(f"egress {text!r} has no range of ports from 1 to 65535", hint=hint)
        return cls(f"{star or ''}{name}", ports, plain is not None)

    def __str__(self) -> str:
        first, last = self.ports
        span = f":{first}" if first == last else "" if (first, last) == (1, 65535) and not self.plain else f":{first}-{last}"
        return f"{self.name}{span}{'/tcp' if self.plain else ''}"


Reach = Literal["host", "metadata"]


def reach(wish: Any) -> tuple[str, ...]:
    """Return what is asked for of Reach: one, or several. Raises InvalidSpec."""
    names = [wish] if isinstance(wish, str) else wish
    if not isinstance(names, Collection) or isinstance(names, Mapping) or not set(names) <= set(get_args(Reach)):
        raise InvalidSpec(f"reach must be of {', '.join(get_args(Reach))}, not {wish!r}", hint='for example ["host"]')
    return tuple(sorted(set(names)))


def cut(wish: Any) -> tuple[str, ...]:
    """Return the machines in `wish`: a name, or several. Raises InvalidSpec."""
    names = [wish] if isinstance(wish, str) else wish
    if not isinstance(names, Collection) or isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
        raise InvalidSpec(f"cut must be names of machines, not {wish!r}", hint='for example ["db"]')
    return tuple(sorted(set(names)))
