"""Asking the helper of a machine that runs (relay.py; guest/src/ports.c says how)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from trivisor.core.errors import EngineError

_TIMEOUT = 5.0
_ANSWER = 256


def publish(place: Path, machine: str, listener: socket.socket, address: str, port: int) -> None:
    """Have connections to `listener` go to a port in the machine. Raises EngineError."""
    _ask(place, machine, f"publish {address} {port}", [listener.fileno()])


def withdraw(place: Path, machine: str, port: int) -> None:
    """Have a port of the host be free again, and end the connections that came through it. Raises EngineError."""
    _ask(place, machine, f"withdraw {port}")


def policy(place: Path, machine: str, text: str) -> None:
    """Have the helper hold to another policy (policy.text). Raises EngineError."""
    with memory(text) as fd:
        _ask(place, machine, "policy", [fd])


def decisions(place: Path, machine: str, ear: socket.socket) -> None:
    """Have the helper say at `ear` what it decides, until that is closed. Raises EngineError."""
    _ask(place, machine, "decisions", [ear.fileno()])


@contextlib.contextmanager
def memory(text: str) -> Iterator[int]:
    """Give a file in memory that holds `text`."""
    fd = os.memfd_create("policy", os.MFD_CLOEXEC)
    try:
        os.write(fd, text.encode())
        yield fd
    finally:
        os.close(fd)


def rules(place: Path, machine: str) -> int:
    """Return the socket that the machine's own table belongs to (own.py). Raises EngineError."""
    fds = _ask(place, machine, "rules")
    if len(fds) != 1:
        raise EngineError("its network's helper has no rules", machine=machine)
    return fds[0]


def _ask(place: Path, machine: str, request: str, fds: Sequence[int] = ()) -> list[int]:
    folder = os.open(place.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as asked:
            asked.settimeout(_TIMEOUT)
            asked.connect(f"/proc/self/fd/{folder}/{place.name}")
            socket.send_fds(asked, [request.encode()], fds)
            answer, given, _, _ = socket.recv_fds(asked, _ANSWER, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        hint = "stop and start the machine"
        raise EngineError("its network's helper does not answer", output=str(error), machine=machine, hint=hint) from error
    finally:
        os.close(folder)
    if answer != b"ok":
        raise EngineError(f"its network's helper refuses {request!r}", output=answer.decode(errors="replace"), machine=machine)
    return given
