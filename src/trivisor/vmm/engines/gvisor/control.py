"""Pause and resume through runsc, for hosts that give us no freezer: the Sentry stops its tasks by itself.

runsc finds its sandbox by a socket that is in the jail (of 2022: in the jail's network namespace), so it is run in there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trivisor.core.errors import EngineError
from trivisor.core.process import find, run
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.gvisor.jailed import NAME
from trivisor.vos.line import Line

_TIMEOUT = 20.0
_LAST = """at=$1 mv=$2 from=$3 to=$4; shift 4; kill -STOP $at; "$@"; status=$?
[ $status != 0 ] || $mv -T -- "$from" "$to"; kill -CONT $at; exit $status"""
"""The machine's runsc, PID 1 in there, waits with its end until the one that we run has ended, which would die with it; and what that
wrote has its name before. By a shell, so that all of it happens though we die."""


class _State(msgspec.Struct):
    status: str


def pause(box: Box, command: Sequence[str]) -> None:
    inside(box, command, "pause", NAME)


def resume(box: Box, command: Sequence[str]) -> None:
    inside(box, command, "resume", NAME)


def paused(box: Box, command: Sequence[str]) -> bool:
    try:
        return msgspec.json.decode(inside(box, command, "state", NAME), type=_State).status == "paused"
    except msgspec.DecodeError as error:
        raise EngineError(f"runsc's state cannot be read: {error}", machine=box.spec.name) from error


def engine(box: Box) -> int:
    """Return the pid of the machine's runsc, PID 1 of its jail. Raises GuestGone."""
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        return int(line.keeper_info()["engine"])
    finally:
        line.close()


def inside(box: Box, command: Sequence[str], *verb: str, pid: int = 0, fds: Sequence[int] = (), timeout: float = _TIMEOUT) -> bytes:
    """Run runsc, with the descriptors `fds`, in the namespaces of the machine's own, whose pid may be known. `command` is its argv
    up to the verb. Raises EngineError, GuestGone."""
    return run(argv(pid or engine(box), command, *verb), timeout=timeout, env={"PATH": "/"}, fds=fds)


def last(pid: int, command: Sequence[str], *verb: str, wrote: tuple[Path, Path], fds: Sequence[int], timeout: float) -> None:
    """The same of a verb that ends the machine; what it `wrote` in one place is in the other if it succeeded, before the keeper ends."""
    names = [str(pid), find("mv", "coreutils"), *map(str, wrote)]
    run(["/bin/sh", "-c", _LAST, "sh", *names, *argv(pid, command, *verb)], timeout=timeout, env={"PATH": "/"}, fds=fds)


def argv(pid: int, command: Sequence[str], *verb: str) -> list[str]:
    """Return the command that runs runsc in the namespaces of the machine whose runsc is `pid`."""
    enter = [find("nsenter", "util-linux"), "--target", str(pid), "--user", "--mount", "--pid", "--net", "--ipc", "--uts"]
    # Without root setgroups(2) is denied in there, which nsenter would call.
    enter += ["--preserve-credentials"] if os.geteuid() else []
    return [*enter, "--", *command, *verb]
