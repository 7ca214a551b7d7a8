"""A command in a machine, joined to our own standard streams: what `run` and `exec` do.

Standard output and error are pumped by a thread each, straight to our descriptors, so nothing is kept and a command may
print for ever. Standard input is pumped by a third that is a daemon: it may sit in read(2) when the command has
long ended, and nothing can wake it. Ctrl-C goes to the command as SIGINT, and a third one kills it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from trivisor.core.errors import ExecTimeout, GuestError, HostLacks
from trivisor.vmm.machine import Machine
from trivisor.vos.processes import Process

CHUNK = 65536
PATIENCE = 2
"""This many Ctrl-C are the command's own business."""


@dataclass(frozen=True)
class Joined:
    """How a command is to be run, and with what of ours."""

    interactive: bool = False
    tty: bool = False
    cwd: str | None = None
    user: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    timeout: float | None = None


def run_joined(machine: Machine, argv: Sequence[str], how: Joined) -> int:
    """Run `argv` in `machine` and return its exit status, 128 + n if signal n killed it.

    Raises HostLacks if a terminal is asked for and we have none, ExecTimeout after `how.timeout` seconds.
    """
    if how.tty:
        return _on_terminal(machine, argv, how)
    process = machine.spawn(list(argv), env=how.env, cwd=how.cwd, user=how.user)
    if how.interactive:
        threading.Thread(target=_feed, args=(process,), daemon=True).start()
    else:
        process.stdin.close()
    pumps = [threading.Thread(target=_drain, args=(stream, fd), daemon=True) for stream, fd in ((process.stdout, 1), (process.stderr, 2))]
    for pump in pumps:
        pump.start()
    status = _await(process, how.timeout, machine.name)
    for pump in pumps:
        pump.join()
    return status
