"""Pause and resume through runsc, for hosts that give us no freezer: the Sentry stops its tasks by itself.

runsc finds its sandbox by a socket that is in the jail (of 2022: in the jail's network namespace), so it is run in there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from trivisor.core.errors import EngineError
from trivisor.core.process import find, run
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.gvisor.jailed import NAME
from trivisor.vos.line import Line

_TIMEOUT = 20.0
_LAST = ["/bin/sh", "-c", 'at=$1; shift; kill -STOP $at; "$@"; status=$?; kill -CONT $at; exit $status', "sh"]
"""The machine's runsc, PID 1 in there, waits with its end until the one that we run has ended, which would die with it. By a shell, so
that it does not wait for ever if we die."""


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


def inside(
    box: Box, command: Sequence[str], *verb: str, pid: int = 0, fds: Sequence[int] = (), timeout: float = _TIMEOUT, last: bool = False
) -> bytes:
    """Run runsc, with the descriptors `fds`, in the namespaces of the machine's own, whose pid may be known. `command` is its argv
    up to the verb. With `last` the machine may end by it. Raises EngineError, GuestGone."""
    target = str(pid or engine(box))
    enter = [find("nsenter", "util-linux"), "--target", target, "--user", "--mount", "--pid", "--net", "--ipc", "--uts"]
    # Without root setgroups(2) is denied in there, which nsenter would call.
    enter += ["--preserve-credentials"] if os.geteuid() else []
    return run([*([*_LAST, target] if last else []), *enter, "--", *command, *verb], timeout=timeout, env={"PATH": "/"}, fds=fds)
