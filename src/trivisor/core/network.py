"""How a machine's network is shaped: values of a Spec, and the forms in which people write them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import KIB, parse_duration, parse_size

MIN_RATE = KIB
MAX_LATENCY = 60.0


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


def cut(wish: Any) -> tuple[str, ...]:
    """Return the machines in `wish`: a name, or several. Raises InvalidSpec."""
    names = [wish] if isinstance(wish, str) else wish
    if not isinstance(names, Collection) or isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
        raise InvalidSpec(f"cut must be names of machines, not {wish!r}", hint='for example ["db"]')
    return tuple(sorted(set(names)))
