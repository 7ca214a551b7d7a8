"""A command in a machine, joined to our own standard streams: what `run` and `exec` do.

Standard output and error are pumped by a thread each, straight to our descriptors, so nothing is kept and a command may
print for ever. Standard input is pumped by a third that is a daemon: it may sit in read(2) when the command has
long ended, and nothing can wake it. Ctrl-C goes to the command as SIGINT, and a third one kills it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from trivisor.cli import render
from trivisor.core.errors import ExecTimeout, HostLacks, TrivisorError
from trivisor.vmm.machine import Machine
from trivisor.vos import terminal
from trivisor.vos.process import Output, Process
from trivisor.vos.syscalls.policy import Policy

CHUNK = 65536
PATIENCE = 2
"""This many Ctrl-C are the command's own business."""


@dataclass(frozen=True)
class Joined:
    """How a command is to be run, and with what of ours."""

    interactive: bool = False
    tty: bool = False
    cwd: str = ""
    user: str = ""
    env: dict[str, str] = field(default_factory=dict)
    timeout: float | None = None
    policy: Policy | None = None


def run_joined(machine: Machine, argv: Sequence[str], how: Joined) -> int:
    """Run `argv` in `machine` and return its exit status, 128 + n if signal n killed it.

    Raises HostLacks if a terminal is asked for and we have none, ExecTimeout after `how.timeout` seconds.
    """
    if how.tty:
        return _on_terminal(machine, argv, how)
    process = machine.spawn(list(argv), env=how.env, cwd=how.cwd, user=how.user, stdin=how.interactive, policy=how.policy)
    with process:
        if how.interactive:
            threading.Thread(target=_feed, args=(process,), daemon=True).start()
        pumps = [_Pump(process.stdout, 1, process), _Pump(process.stderr, 2, process)]
        status = _ended(process, how.timeout, machine.name)
        for pump in pumps:
            pump.finish()
        if process.out_of_memory():
            render.error(
                f"{machine.name} ran out of memory, and the command was killed",
                f"trivisor modify --memory SIZE {machine.name} gives it more",
            )
        return status


def _on_terminal(machine: Machine, argv: Sequence[str], how: Joined) -> int:
    if not os.isatty(0):
        raise HostLacks("-t needs a terminal, and our standard input is not one", hint="leave -t out")
    env = {"TERM": os.environ.get("TERM", "xterm"), **how.env}
    size = terminal.size_of(1)
    with machine.spawn(list(argv), env=env, cwd=how.cwd, user=how.user, pty=True, size=size, policy=how.policy) as process:
        return terminal.attach(process)


class _Pump:
    """Writes one output of a command to a descriptor of ours, in a thread of its own."""

    def __init__(self, source: Output, fd: int, process: Process) -> None:
        self._source, self._fd, self._process = source, fd, process
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while chunk := self._source.read(CHUNK):
                _write(self._fd, chunk)
        except (OSError, TrivisorError) as error:
            self._error = error
            if isinstance(error, BrokenPipeError):
                self._process.close()  # whoever read us has gone, so nobody wants the rest

    def finish(self) -> None:
        """Wait until all has been written. Raises what writing raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _feed(process: Process) -> None:
    """Write our standard input to the command until either ends."""
    try:
        while chunk := os.read(0, CHUNK):
            process.stdin.write(chunk)
        process.stdin.close()
    except (OSError, ValueError, TrivisorError):
        return  # the command has ended or the line is gone: whoever waits for the command says so


def _ended(process: Process, timeout: float | None, name: str) -> int:
    """Wait for the end, handing Ctrl-C on. Raises ExecTimeout once the command has been killed for its time."""
    deadline = None if timeout is None else time.monotonic() + timeout
    interrupts = 0
    while True:
        try:
            return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            interrupts += 1
            process.kill(signal.SIGINT if interrupts <= PATIENCE else signal.SIGKILL)
        except TimeoutError as error:
            if timeout is None:
                raise
            process.kill(signal.SIGKILL)
            raise ExecTimeout(name, timeout) from error
