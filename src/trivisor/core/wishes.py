"""The parts of a Spec that are values of their own, and the forms in which people write them."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import parse_size

VOLUME_NAME = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")
MAX_VOLUMES = 64
MAX_CPUSET = 4096
"""The processor with the highest number that a cpuset may name is below this."""

_KERNELS = ("/proc", "/sys", "/dev")
_CPUSET = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", re.ASCII)


class Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a machine finds at a path: a folder of the host, or a volume of the home."""

    source: str
    """An absolute path on the host, or the name of a volume."""
    readonly: bool = False

    @property
    def named(self) -> bool:
        """Whether it is a volume of the home rather than a folder of the host."""
        return not self.source.startswith("/")


class IoLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a machine may do with the disk that its files lie on, a second. None: no limit."""

    read_bps: int | None = None
    """Bytes read a second."""
    write_bps: int | None = None
    read_iops: int | None = None
    """Operations a second."""
    write_iops: int | None = None


def volumes(wish: Any) -> dict[str, Volume]:
    """Return the volumes in `wish`: guest paths to a Volume, a Path, or text such as "name", "/host/path", "name:ro".

    Raises InvalidSpec.
    """
    if not isinstance(wish, Mapping):
        raise InvalidSpec(f"volumes must map paths in the machine to folders, not {wish!r}", hint='for example {"/data": Path("data")}')
    if len(wish) > MAX_VOLUMES:
        raise InvalidSpec(f"a machine may have {MAX_VOLUMES} volumes, not {len(wish)}")
    made = {_place(place): _volume(value) for place, value in wish.items()}
    if len(made) < len(wish):
        raise InvalidSpec("two volumes have the same place in the machine")
    return dict(sorted(made.items()))


def tmpfs(wish: Any) -> dict[str, int]:
    """Return the folders in memory in `wish`: guest paths to sizes such as "64M". Raises InvalidSpec."""
    if not isinstance(wish, Mapping):
        raise InvalidSpec(f"tmpfs must map paths in the machine to sizes, not {wish!r}", hint='for example {"/scratch": "64M"}')
    if len(wish) > MAX_VOLUMES:
        raise InvalidSpec(f"a machine may have {MAX_VOLUMES} folders in memory, not {len(wish)}")
    made = {_place(place): parse_size(size, f"tmpfs {place}") for place, size in wish.items()}
    if len(made) < len(wish):
        raise InvalidSpec("two folders in memory have the same place in the machine")
    return dict(sorted(made.items()))


def volume_name(name: str) -> str:
    """Return `name` if a volume can be called so. Raises InvalidSpec."""
    if not isinstance(name, str) or not VOLUME_NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} is not the name of a volume", hint="use a-z, 0-9, '.', '_' and '-'; a folder of the host is a Path, or begins with /"
        )
    return name


def io_limits(wish: Any) -> IoLimits:
    """Return the limits in `wish`: IoLimits, or a mapping such as {"write_bps": "10M"}. Raises InvalidSpec."""
    if isinstance(wish, IoLimits):
        wish = msgspec.to_builtins(wish)
    if not isinstance(wish, Mapping) or not all(isinstance(key, str) for key in wish):
        raise InvalidSpec(f"io must map limits to numbers, not {wish!r}", hint='for example {"write_bps": "10M"}')
    unknown = set(wish) - set(IoLimits.__struct_fields__)
    if unknown:
        raise InvalidSpec(f"io has no {', '.join(sorted(unknown))}", hint=f"it has {', '.join(IoLimits.__struct_fields__)}")
    return IoLimits(**{key: parse_size(value, f"io {key}") for key, value in wish.items() if value is not None})


def cpuset(wish: Any) -> str:
    """Return `wish`, a list of processors such as "0-1,3" (cpuset(7), "List format"). Raises InvalidSpec."""
    if not isinstance(wish, str) or len(wish) > 1024 or not _CPUSET.fullmatch(wish):
        raise InvalidSpec(f"cpuset {wish!r} is not a list of processors", hint='for example "0-1" or "0,2"')
    for part in wish.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first) or int(last or first) >= MAX_CPUSET:
            raise InvalidSpec(f"cpuset {wish!r} holds {part}, which is no range of processors")
    return wish


def _place(place: Any) -> str:
    """Return a guest path as it is kept: absolute, without what means nothing."""
    if isinstance(place, os.PathLike):
        place = os.fspath(place)
    if not isinstance(place, str) or not place.startswith("/") or ".." in place.split("/") or len(place) > 1024:
        raise InvalidSpec(f"{place!r} is not a place for a volume", hint="an absolute path in the machine, without '..'")
    whole = posixpath.normpath("/" + place.lstrip("/"))
    if whole == "/" or any(whole == kernel or whole.startswith(kernel + "/") for kernel in _KERNELS):
        raise InvalidSpec(f"a volume cannot lie at {whole}", hint="choose a path such as /data")
    return whole


def _volume(value: Any) -> Volume:
    readonly = False
    if isinstance(value, Volume):
        value, readonly = value.source, value.readonly
    elif isinstance(value, Mapping):
        try:
            return _volume(msgspec.convert(value, Volume))
        except msgspec.ValidationError as error:
            raise InvalidSpec(f"a volume is not {value!r}: {error}") from None
    elif isinstance(value, os.PathLike):
        value = str(Path(os.fspath(value)).absolute())
    elif isinstance(value, str):
        source, colon, mode = value.rpartition(":")
        if colon and mode in ("ro", "rw"):
            value, readonly = source, mode == "ro"
    if not isinstance(value, str) or len(value) > 4095:
        raise InvalidSpec(f"{value!r} is not a folder of the host or the name of a volume")
    if not value.startswith("/"):
        return Volume(volume_name(value), readonly)
    return Volume(posixpath.normpath("/" + value.lstrip("/")), readonly)
