"""Launch plans: flat lists of operations that `tvinit launch` and `tvinit keep` carry out (guest/PROTOCOL.md, "Plans").

Composing a plan runs nothing: it can be printed, compared and tested.
"""

from __future__ import annotations

import shlex
import struct

from trivisor.core.errors import InvalidSpec

Op = tuple[str, ...]
Plan = tuple[Op, ...]

MAX = 1 << 20
"""Bytes of an encoded plan, as tvinit bounds it."""


def encode(plan: Plan) -> bytes:
    """Return the bytes that tvinit reads. Raises InvalidSpec for a NUL in a word, and for what is too big."""
    size = struct.Struct("<I").pack
    parts = [size(len(plan))]
    for op in plan:
        parts.append(size(len(op)))
        for word in op:
            data = word.encode(errors="surrogateescape")
            if b"\0" in data:
                raise InvalidSpec(f"{word!r} holds a NUL")
            parts += (size(len(data)), data)
    whole = b"".join(parts)
    if len(whole) > MAX:
        raise InvalidSpec(f"a plan of {len(whole)} bytes is more than {MAX}", hint="give fewer or shorter arguments and environment")
    return whole


def render(plan: Plan) -> str:
    """Return the plan as lines that a person reads, quoted as a shell would."""
    return "\n".join(shlex.join(word if len(word) <= 200 else f"{word[:40]}...({len(word)})" for word in op) for op in plan)
