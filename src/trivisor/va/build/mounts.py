"""RUN --mount: what a step sees besides its root, and leaves nothing of in the image (Dockerfile reference, "RUN --mount")."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Literal, cast

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import parse_size

Kind = Literal["bind", "cache", "tmpfs", "secret"]
Sharing = Literal["shared", "private", "locked"]
_KEYS: dict[str, frozenset[str]] = {
    "bind": frozenset({"type", "target", "source", "from", "rw"}),
    "cache": frozenset({"type", "id", "target", "ro", "sharing", "from", "source", "mode", "uid", "gid"}),
    "tmpfs": frozenset({"type", "target", "size"}),
    "secret": frozenset({"type", "id", "target", "required", "mode", "uid", "gid", "env"}),
}
_SAME = {"dst": "target", "destination": "target", "src": "source", "readonly": "ro", "readwrite": "rw"}
_WORDS = {"true": True, "1": True, "": True, "false": False, "0": False}


@dataclass(frozen=True)
class Mount:
    """One mount of a step. Paths are the step's; `source` lies in `source_stage`, an image or a stage, or in the context if that is ""."""

    kind: Kind
    target: str
    source: str = ""
    source_stage: str = ""
    id: str = ""
    readonly: bool = False
    sharing: Sharing = "shared"
    required: bool = False
    size: int | None = None
    """Of a tmpfs, in bytes."""
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    env: str = ""
    """Of a secret: the variable that holds it; it is a file too where a target was given."""


def parse_mount(text: str) -> Mount:
    """Read `type=cache,target=/x,...`. Raises ValueError."""
    values: dict[str, str] = {}
    for part in next(csv.reader([text]), []):
        key, _, value = part.partition("=")
        key = _SAME.get(key.strip().lower(), key.strip().lower())
        values[key] = value
    kind = values.get("type", "bind")
    if kind not in _KEYS:
        raise ValueError(f"there is no type {kind!r}; there are {', '.join(_KEYS)}")
    if kind in ("bind", "cache"):
        values.setdefault("ro" if kind == "cache" else "rw", _negated(values.pop("rw" if kind == "cache" else "ro", None)))
    if unknown := values.keys() - _KEYS[kind]:
        raise ValueError(f"type={kind} takes no {', '.join(sorted(unknown))}; it takes {', '.join(sorted(_KEYS[kind]))}")
    target = values.get("target", "")
    if kind == "secret" and not target and not values.get("env") and not values.get("id"):
        raise ValueError("a secret needs id=")
    if kind != "secret" and not target:
        raise ValueError(f"type={kind} needs target=")
    sharing = values.get("sharing", "shared")
    if sharing not in ("shared", "private", "locked"):
        raise ValueError(f"sharing={sharing} is not shared, private or locked")
    return Mount(
        kind=cast(Kind, kind),
        target=target or ("" if values.get("env") else f"/run/secrets/{values['id']}"),
        source=values.get("source", ""),
        source_stage=values.get("from", ""),
        id=values.get("id", "") or (target if kind == "cache" else target.rpartition("/")[2]),
        readonly=not _flag(values, "rw") if kind == "bind" else _flag(values, "ro"),
        sharing=cast(Sharing, sharing),
        required=_flag(values, "required"),
        size=_size(values["size"]) if "size" in values else None,
        mode=_number(values, "mode", 0o400 if kind == "secret" else 0o755, 8),
        uid=_number(values, "uid", 0, 10),
        gid=_number(values, "gid", 0, 10),
        env=values.get("env", ""),
    )


def _negated(value: str | None) -> str:
    """`ro` of a bind is not `rw`, and the other way round; both default to writable caches and read-only binds."""
    if value is None:
        return "false"
    return "false" if _WORDS.get(value.lower(), True) else "true"


def _flag(values: dict[str, str], key: str) -> bool:
    if key not in values:
        return False
    if (word := values[key].lower()) not in _WORDS:
        raise ValueError(f"{key}={word} is not true or false")
    return _WORDS[word]


def _number(values: dict[str, str], key: str, default: int, base: int) -> int:
    if key not in values:
        return default
    number = int(values[key], base)
    if not 0 <= number < (0o10000 if key == "mode" else 1 << 32):
        raise ValueError(f"{key}={values[key]} is out of range")
    return number


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InvalidSpec as error:
        raise ValueError(error.message) from error
