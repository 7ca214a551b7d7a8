"""The helper on the host that a machine has for its published ports, for names and for what its policy says of names (guest/src/relay.c).

Its sockets are made here: a port that is taken is known before anything is started, and the helper needs no privilege. It runs
jailed under the machine's keeper, so a published port is free in the instant that the machine ends. Every machine with a link has one,
since it is also what keeps the machine's own table (own.py), and takes ports that come later (control.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from trivisor.core.errors import EngineError
from trivisor.core.paths import MachineDir
from trivisor.launch import jail, keeper, tvinit
from trivisor.launch.jail import Bind
from trivisor.launch.keeper import Process
from trivisor.launch.net import control
from trivisor.launch.net.own import Helper
from trivisor.launch.net.pool import Block
from trivisor.launch.plan import Plan

DNS = 53
_BACKLOG = 128
_FIRST = 10
"""Descriptors of the helper's sockets begin here."""
_NAMES = "/names"
_NOTES = 1 << 16
"""Bytes: of 128 lines (egress.h)."""


@dataclass(frozen=True)
class Relay:
    """The helper as the keeper is told of it, and the descriptors that its plan names."""

    process: Process
    fds: tuple[int, ...]
    at: Helper
    """Where it listens."""


def listen(stack: ExitStack, ports: Mapping[int, int], machine: str) -> dict[int, int]:
    """Listen on the host's ports and return {descriptor: port in the machine}; `stack` closes them. Raises EngineError if one is taken."""
    return {stack.enter_context(listener(host, machine)).fileno(): guest for host, guest in sorted(ports.items())}


def listener(host: int, machine: str) -> socket.socket:
    """Listen on a port of the host's loopback (0: a free one). Raises EngineError if it is taken."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(("127.0.0.1", host))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        hint = "publish another port, or end what listens there"
        raise EngineError(f"host port {host} on 127.0.0.1 {why}", machine=machine, hint=hint) from error
    return made


def relay(
    stack: ExitStack,
    place: MachineDir,
    slot: int,
    block: Block,
    ports: Mapping[int, int],
    *,
    names: Path | None,
    upstreams: Sequence[str],
    asked: bool,
    policy: str,
    rules: int,
    log: int | None = None,
) -> Relay:
    """Return the helper of one machine. `ports`: of `listen`. `names`: the network's folder. `upstreams`: whom it asks for names itself.

    `asked`: the machine asks it for names, at the port that is theirs; else it gets only what a policy sends there. `policy`: what holds
    from the beginning. `rules` is the socket that the machine's own table belongs to. `log` takes its last words.
    """
    fds: dict[int, int] = {}
    argv = [str(tvinit.path()), "relay"]
    for fd, guest in ports.items():
        fds[fd] = _FIRST + len(fds)
        argv.append(f"tcp:{fds[fd]}:{block.address}:{guest}")
    sockets = [
        _socket(stack, block, socket.SOCK_DGRAM, DNS if asked else 0),
        _socket(stack, block, socket.SOCK_STREAM, DNS if asked else 0),
        _socket(stack, block, socket.SOCK_STREAM, 0),
    ]
    for word, one in zip(("names", "questions", "gate"), sockets, strict=True):
        fds[one.fileno()] = _FIRST + len(fds)
        argv.append(f"{word}:{fds[one.fileno()]}")
    argv += [f"upstream:{server}" for server in upstreams]
    start = stack.enter_context(control.memory(policy))
    fds[start] = _FIRST + len(fds)
    argv.append(f"policy:{fds[start]}")
    place.logs.mkdir(mode=0o700, exist_ok=True)
    notes = os.open(_notes(place), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, notes)
    fds[notes] = _FIRST + len(fds)
    argv.append(f"notes:{fds[notes]}")
    if names:
        argv.append(f"folder:{names if not jail.probe().namespaces else _NAMES}")
    changed = _control(stack, place)
    fds[changed] = _FIRST + len(fds)
    fds[rules] = _FIRST + len(fds)
    argv.append(f"control:{fds[changed]}:{fds[rules]}")
    if log is not None:
        fds[log] = 2
    at = Helper(block.gateway, *(int(one.getsockname()[1]) for one in sockets))
    return Relay(Process("relay", _plan(argv, place, slot, fds, names)), tuple(fds), at)


def refusals(place: MachineDir) -> list[tuple[float, str]]:
    """Return when a machine was refused something by a policy of names, and what: the first of each kind in its life, so many at most."""
    try:
        with _notes(place).open("rb") as file:
            lines = file.read(_NOTES).decode("ascii", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            at, _, protocol, address, port, name, why, _ = line.split("\t")
            whom = " ".join(filter(None, (name, address and f"{address}:{port}")))
            if isfinite(float(at)):
                found.append((float(at), f"refused {protocol} {whom}: {why}"))
    return found


def _notes(place: MachineDir) -> Path:
    return place.log("egress")


def _plan(argv: list[str], place: MachineDir, slot: int, fds: Mapping[int, int], names: Path | None) -> Plan:
    root = place.root / "relay"
    root.mkdir(mode=0o700, exist_ok=True)
    binds = [Bind(tvinit.path(), argv[0], "ro,exec")]
    if names is not None:
        binds.append(Bind(names, _NAMES, "ro"))
    return jail.jail(argv, binds=binds, env={}, fds=fds, root=root, slot=slot, network="host")


def _socket(stack: ExitStack, block: Block, kind: int, port: int) -> socket.socket:
    """Bind to the machine's gateway, on its interface alone: no other machine can ask here."""
    asked = stack.enter_context(socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC))
    asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, block.interface.encode())
        asked.bind((block.gateway, port))
        if kind == socket.SOCK_STREAM:
            asked.listen(_BACKLOG)
    except OSError as error:
        raise EngineError(f"names cannot be served on {block.interface}: {error.strerror}") from error
    return asked


def _control(stack: ExitStack, place: MachineDir) -> int:
    """Listen where the machine's owner changes ports and rules."""
    folder = os.open(place.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, folder)
    asked = stack.enter_context(keeper.bind(folder, place.net.name, socket.SOCK_SEQPACKET))
    asked.listen(_BACKLOG)
    return asked.fileno()
