"""What a machine is asked to be: a value, checked once when it is made.

`Spec.make(...)` takes what people write ("256M", "10m") and returns a Spec of plain numbers, which is
what records hold and engines read. Raises InvalidSpec, naming the field.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal, Self

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import GIB, MIB, TIB, parse_duration, parse_size

Wall = Literal["vm", "gvisor", "container"]
WALLS: tuple[Wall, ...] = ("vm", "gvisor", "container")
Lifetime = Literal["persistent", "process"]
Network = Literal["none", "nat"]

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MIN_MEMORY = 96 * MIB
MAX_CPUS = 64
MIN_DISK = 16 * MIB
MAX_DISK = 16 * TIB
"""As much as ext4 holds with blocks of 4 KiB."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine's wishes. Sizes are bytes, durations seconds."""

    image: str
    """Reference of the image its root is made from."""
    name: str
    """A DNS label, unique in the home; also the machine's hostname."""
    wall: Wall
    cpus: int = 1
    memory: int = 256 * MIB
    disk: int | Literal["ram"] = 8 * GIB
    """Size of the writable layer; "ram" keeps it in the machine's memory, gone at stop."""
    kernel: str = "micro"
    """vm wall: "micro", "full", or the path of a bzImage or vmlinux."""
    network: Network = "none"
    ports: dict[int, int] = {}
    """Published ports, host to guest (TCP, on the host's loopback). Needs network "nat"."""
    env: dict[str, str] = {}
    """Environment of every exec, under what the exec itself gives."""
    lifetime: Lifetime = "persistent"
    """"process": the machine is taken down and deleted when the process that created it ends."""
    ttl: float | None = None
    """Seconds from a start until the keeper stops the machine."""
    idle: float | None = None
    """Seconds without traffic from any host client until the keeper stops the machine."""
    labels: dict[str, str] = {}

    @classmethod
    def make(cls, **wishes: Any) -> Self:
        """Return a checked Spec from what a person wrote; None means the default."""
        given = {key: value for key, value in wishes.items() if value is not None}
        unknown = given.keys() - set(cls.__struct_fields__)
        if unknown:
            raise InvalidSpec(f"a machine has no {', '.join(sorted(unknown))}", hint=f"it has {', '.join(cls.__struct_fields__)}")
        if "memory" in given:
            given["memory"] = parse_size(given["memory"], "memory")
        if given.get("disk", "ram") != "ram":
            given["disk"] = parse_size(given["disk"], "disk")
        for field in ("ttl", "idle"):
            if field in given:
                given[field] = parse_duration(given[field], field)
        if isinstance(given.get("kernel"), os.PathLike):
            given["kernel"] = os.fspath(given["kernel"])
        if "ports" in given:
            given["ports"] = _ports(given["ports"])
        try:
            spec = msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise InvalidSpec(f"{error}") from None
        _check(spec)
        return spec


def _check(spec: Spec) -> None:
    if not NAME.fullmatch(spec.name):
        raise InvalidSpec(
            f"name {spec.name!r} is not a DNS label", hint="use a-z, 0-9 and -, at most 63, starting and ending with a letter or digit"
        )
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise InvalidSpec(f"cpus must be 1 to {MAX_CPUS}, not {spec.cpus}")
    if spec.memory < MIN_MEMORY:
        raise InvalidSpec(f"memory must be at least {MIN_MEMORY // MIB}M, not {spec.memory} bytes")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if spec.memory > total:
        raise InvalidSpec(f"memory of {spec.memory // MIB}M is more than the host's {total // MIB}M")
    if spec.disk != "ram" and spec.disk < MIN_DISK:
        raise InvalidSpec(f"disk must be at least {MIN_DISK // MIB}M, not {spec.disk} bytes")
    if spec.disk != "ram" and spec.disk > MAX_DISK:
        raise InvalidSpec(f"disk must be at most {MAX_DISK // TIB}T, not {spec.disk} bytes")
    if not spec.image or not spec.kernel:
        raise InvalidSpec("image and kernel must not be empty")
    if spec.ports and spec.network != "nat":
        raise InvalidSpec("published ports need a network", hint='give network="nat"')
    for key, value in spec.env.items():
        if not key or "=" in key:
            raise InvalidSpec(f"env {key!r} is not the name of a variable")
        _text(f"env {key!r}", key + value)
    for key, value in spec.labels.items():
        _text(f"label {key!r}", key + value)
    _text("image", spec.image)
    _text("kernel", spec.kernel)


def _text(what: str, text: str) -> None:
    """Raise InvalidSpec for text that neither JSON nor an argument of a program can hold."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidSpec(f"{what} holds a NUL or what is not Unicode text")


def _ports(ports: Any) -> dict[int, int]:
    if not isinstance(ports, dict):
        raise InvalidSpec(f"ports must map host ports to guest ports, not {ports!r}", hint="for example {8080: 80}")
    for host, guest in ports.items():
        for port in (host, guest):
            if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
                raise InvalidSpec(f"port {port!r} is not 1 to 65535")
    return dict(ports)


def encode(spec: Spec) -> bytes:
    """Return the JSON that records hold."""
    return msgspec.json.encode(spec)


def decode(data: bytes | str) -> Spec:
    """Return the Spec in `data`. Raises msgspec.ValidationError for what is not one."""
    return msgspec.json.decode(data, type=Spec)
