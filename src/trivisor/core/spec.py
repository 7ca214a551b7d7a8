"""What a machine is asked to be: a value, checked once when it is made.

`Spec.make(...)` takes what people write ("256M", "10m") and returns a Spec of plain numbers, which is
what records hold and engines read. Raises InvalidSpec, naming the field.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Literal, Self

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.network import Egress, Reach, Shape, cut, egress, reach, shape
from trivisor.core.rules import SyscallSpec, syscalls
from trivisor.core.units import GIB, MIB, TIB, parse_duration, parse_size
from trivisor.core.wishes import IoLimits, Volume, cpuset, io_limits, tmpfs, volumes

Wall = Literal["vm", "gvisor", "container"]
WALLS: tuple[Wall, ...] = ("vm", "gvisor", "container")
Lifetime = Literal["persistent", "process"]
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
HOST_IMAGE = "host"
"""The image that is the host's own root (images/host.py): container and gvisor."""
MIN_MEMORY: dict[Wall, int] = {"vm": 96 * MIB, "gvisor": 32 * MIB, "container": 6 * MIB}
MIN_CPUS, MAX_CPUS = 0.01, 64
MAX_PIDS = 1 << 22
LIMITS = ("cpus", "memory", "swap", "cpuset", "pids", "io")
"""What control groups, or the wall itself, bound."""
PASSING = "trivisor.passing"
"""A label of machines after which there will be no others with their image, as of a build's: nothing is prepared for a next start."""
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
    cpus: int | float = 1
    """Whole on the vm wall; elsewhere a share of the host's processor time, such as 0.5."""
    memory: int = 256 * MIB
    swap: int | None = None
    """Bytes of the host's swap beyond `memory` (container, gvisor); None: as the host has it."""
    cpuset: str | None = None
    """The host's processors that it may run on, such as "0-1,3"."""
    pids: int | None = None
    """How many processes and threads there may be; None: the wall's default."""
    io: IoLimits | None = None
    disk: int | Literal["ram"] = 8 * GIB
    """Size of the writable layer; "ram" keeps it in the machine's memory, gone at stop."""
    kernel: str = "micro"
    """vm wall: "micro", "full", or the path of a bzImage or vmlinux."""
    ram: Literal["private", "shared"] = "private"
    """vm wall: "shared" lets this process map the machine's memory (vos/memory); a start then copies the ice."""
    hugepages: Literal["transparent", "reserved"] | None = None
    """vm wall: its RAM in pages of 2 MiB, as far as the kernel finds some, or of those that root has set aside."""
    dedupe: bool = False
    """Let the host's kernel keep pages once that are equal to those of other machines (vmm/dedupe.py): vm, container."""
    oom: Literal["kill", "stop"] = "kill"
    """When its memory runs out: "kill" one program, the one that the kernel picks, or "stop" it as a whole (state failed)."""
    network: str = "none"
    """ "none", "nat", "host" (container: the host's own), or the name of a network of the home, which is made with its
    first machine: like nat, and its machines reach each other as NAME and NAME.trivisor."""
    ports: dict[int, int] = {}
    """Published ports, host to guest (TCP, on the host's loopback). Needs "nat" or a named network."""
    shape: Shape | None = None
    """How well it is connected: rates, latency, loss (core/network.py)."""
    egress: Egress | None = None
    """What it may begin to talk to; None: all that its network lets it. Members of its named network are always of that."""
    reach: tuple[Reach, ...] = ()
    """What is denied to all machines that do not ask for it: "host", the host's own addresses (never its loopback); "metadata", link-local
    and the other addresses where clouds tell a host its secrets."""
    cut: tuple[str, ...] = ()
    """Machines of its named network that it does not reach, and that do not reach it."""
    volumes: dict[str, Volume] = {}
    """Path in the machine to what lies there."""
    tmpfs: dict[str, int] = {}
    """Path in the machine to a folder in its memory, of so many bytes, empty at each start and everybody's."""
    env: dict[str, str] = {}
    """Environment of every exec, under what the exec itself gives."""
    lifetime: Lifetime = "persistent"
    """"process": the machine is taken down and deleted when the process that created it ends."""
    ttl: float | None = None
    """Seconds from a start until the keeper stops the machine."""
    idle: float | None = None
    """Seconds without traffic from any host client until the keeper stops the machine."""
    labels: dict[str, str] = {}
    syscalls: SyscallSpec | None = None
    """What its programs get from their system calls, whoever starts them: rules and paths (core/rules.py)."""
    asked: tuple[str, ...] = ()
    """Which of LIMITS, and "disk", were given, not left to their defaults: if one cannot be enforced, that is an error. Set by make."""

    @classmethod
    def make(cls, **wishes: Any) -> Self:
        """Return a checked Spec from what a person wrote; None means the default."""
        given = {key: value for key, value in wishes.items() if value is not None}
        fields = [field for field in cls.__struct_fields__ if field != "asked"]
        unknown = given.keys() - set(fields)
        if unknown:
            raise InvalidSpec(f"a machine has no {', '.join(sorted(unknown))}", hint=f"it has {', '.join(fields)}")
        for field, read in _READERS.items():
            if field in given:
                given[field] = read(given[field])
        given["asked"] = tuple(field for field in (*LIMITS, "disk") if field in given)
        try:
            spec = msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise InvalidSpec(f"{error}") from None
        _check(spec)
        return spec


def checked(spec: Spec) -> Spec:
    """Return a Spec that was changed, if a machine can be so. Raises InvalidSpec."""
    _check(spec)
    return spec


def _check(spec: Spec) -> None:
    if not NAME.fullmatch(spec.name):
        raise InvalidSpec(
            f"name {spec.name!r} is not a DNS label", hint="use a-z, 0-9 and -, at most 63, starting and ending with a letter or digit"
        )
    if not spec.image or not spec.kernel:
        raise InvalidSpec("image and kernel must not be empty")
    _check_sizes(spec)
    _check_network(spec)
    for key, value in spec.env.items():
        if not key or "=" in key:
            raise InvalidSpec(f"env {key!r} is not the name of a variable")
        _text(f"env {key!r}", key + value)
    for key, value in spec.labels.items():
        _text(f"label {key!r}", key + value)
    for key, volume in spec.volumes.items():
        _text(f"volume {key!r}", key + volume.source)
    if both := spec.volumes.keys() & spec.tmpfs.keys():
        raise InvalidSpec(f"a volume and a folder in memory are both to lie at {min(both)}")
    for key in spec.tmpfs:
        _text(f"tmpfs {key!r}", key)
    _text("image", spec.image)
    _text("kernel", spec.kernel)


def _check_sizes(spec: Spec) -> None:
    least = 1 if spec.wall == "vm" else MIN_CPUS
    if not least <= spec.cpus <= MAX_CPUS:
        raise InvalidSpec(f"cpus must be {least:g} to {MAX_CPUS}, not {spec.cpus}")
    if spec.wall == "vm" and not isinstance(spec.cpus, int):
        raise InvalidSpec(f"cpus must be a whole number on the vm wall, not {spec.cpus}")
    if spec.ram != "private" and spec.wall != "vm":
        raise InvalidSpec(f"the {spec.wall} wall has no RAM to share", hint='leave out ram, or give wall="vm"')
    if spec.hugepages is not None and spec.wall != "vm":
        raise InvalidSpec(f"the {spec.wall} wall has no RAM to be in huge pages", hint='leave out hugepages, or give wall="vm"')
    if spec.hugepages is not None and (spec.ram == "shared" or (spec.dedupe and spec.hugepages == "reserved")):
        raise InvalidSpec("memory in huge pages can be neither mapped by others nor merged", hint='leave out ram="shared" and dedupe')
    if spec.dedupe and spec.ram == "shared":
        raise InvalidSpec("memory that others may map cannot be merged with equal pages", hint='leave out dedupe, or ram="shared"')
    if spec.memory < MIN_MEMORY[spec.wall]:
        raise InvalidSpec(f"memory must be at least {MIN_MEMORY[spec.wall] // MIB}M on the {spec.wall} wall, not {spec.memory} bytes")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if spec.memory > total:
        raise InvalidSpec(f"memory of {spec.memory // MIB}M is more than the host's {total // MIB}M")
    if spec.pids is not None and not 1 <= spec.pids <= MAX_PIDS:
        raise InvalidSpec(f"pids must be 1 to {MAX_PIDS}, not {spec.pids}")
    if spec.disk != "ram" and spec.disk < MIN_DISK:
        raise InvalidSpec(f"disk must be at least {MIN_DISK // MIB}M, not {spec.disk} bytes")
    if spec.disk != "ram" and spec.disk > MAX_DISK:
        raise InvalidSpec(f"disk must be at most {MAX_DISK // TIB}T, not {spec.disk} bytes")


def _check_network(spec: Spec) -> None:
    if not NAME.fullmatch(spec.network):
        raise InvalidSpec(f"network {spec.network!r} is not a DNS label", hint="none, nat, host, or a name of your own such as backend")
    if spec.network == "host" and spec.wall != "container":
        raise InvalidSpec(f"the {spec.wall} wall cannot share the host's network", hint='give network="nat", or wall="container"')
    if spec.ports and spec.network == "none":
        raise InvalidSpec("published ports need a network", hint='give network="nat"')
    if spec.ports and spec.network == "host":
        raise InvalidSpec("a machine on the host's network has the host's ports as they are", hint="leave out ports")
    if spec.shape and spec.network in ("none", "host"):
        raise InvalidSpec("only a network of its own can be shaped", hint='give network="nat"')
    if spec.egress is not None and spec.network in ("none", "host"):
        raise InvalidSpec("only a network of its own has an egress policy", hint='give network="nat"; network="none" is without any')
    if spec.reach and spec.network in ("none", "host"):
        raise InvalidSpec("only a machine on a network of its own can be let reach the host", hint='give network="nat"')
    if spec.cut and spec.network in ("none", "host", "nat"):
        raise InvalidSpec("only machines of a named network can be cut off from each other", hint='give network="backend"')
    for other in spec.cut:
        if not NAME.fullmatch(other) or other == spec.name:
            raise InvalidSpec(f"cut {other!r} is not the name of another machine")


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


def _cpus(wish: Any) -> Any:
    # 2.0 and 2 are one wish, and so one record.
    return int(wish) if isinstance(wish, float) and wish.is_integer() else wish


def swap_size(wish: Any) -> int:
    """Return bytes of swap, of which there may be none. Raises InvalidSpec."""
    none = wish == 0 and not isinstance(wish, bool)
    return 0 if none or wish == "0" else parse_size(wish, "swap")


_READERS: dict[str, Callable[[Any], Any]] = {
    "cpus": _cpus,
    "memory": lambda wish: parse_size(wish, "memory"),
    "swap": swap_size,
    "cpuset": cpuset,
    "io": io_limits,
    "disk": lambda wish: wish if wish == "ram" else parse_size(wish, "disk"),
    "kernel": lambda wish: os.fspath(wish) if isinstance(wish, os.PathLike) else wish,
    "ports": _ports,
    "shape": shape,
    "egress": egress,
    "reach": reach,
    "cut": cut,
    "volumes": volumes,
    "tmpfs": tmpfs,
    "syscalls": syscalls,
    "ttl": lambda wish: parse_duration(wish, "ttl"),
    "idle": lambda wish: parse_duration(wish, "idle"),
}
"""What people write, to what the field holds."""


def encode(spec: Spec) -> bytes:
    """Return the JSON that records hold."""
    return msgspec.json.encode(spec)


def decode(data: bytes | str) -> Spec:
    """Return the Spec in `data`. Raises msgspec.ValidationError for what is not one."""
    return msgspec.json.decode(data, type=Spec)
