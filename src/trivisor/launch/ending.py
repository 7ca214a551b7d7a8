"""Ending a machine's keeper, and what it left of a life (`tvinit keep`, guest/PROTOCOL.md, "Plans"). keeper.py starts it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.paths import MachineDir
from trivisor.core.process import glance, running, start_time
from trivisor.launch.alive import LOOK, alive

_KEEPER_STOP = 0x43
_CHILDREN = 4096
"""Bytes of the pids of a keeper's processes, which are ten at most."""


@dataclass(frozen=True)
class Exit:
    """How a life ended (the keeper's exit record)."""

    how: str
    """"exited" or "signaled"."""
    value: int
    """The engine's exit status, or the signal's number."""
    reason: str
    """Who ended it: "" the engine itself, owner, ttl, idle, keeper-term, abandoned, or what was given to stop."""
    bye: int | None
    """The status of the guest's orderly power-off; None if there was none."""
    ended: float
    """Seconds since the epoch."""


def identity(machine: MachineDir) -> tuple[int, int]:
    """Return (pid, start time) of the keeper that last ran; (0, 0) if there was none."""
    try:
        pid, start = glance(machine.keeper).split()
        return int(pid), int(start)
    except (FileNotFoundError, ValueError):
        return 0, 0


def children(pid: int) -> list[int]:
    """Return the processes that the keeper runs (proc(5), "children")."""
    try:
        return [int(child) for child in glance(f"/proc/{pid}/task/{pid}/children", _CHILDREN).split()]
    except OSError:
        return []


def wait_for(pidfds: Sequence[int], deadline: float) -> None:
    """Wait until these processes have ended, or the deadline."""
    poller = select.poll()
    waiting = set(pidfds)
    for fd in pidfds:
        poller.register(fd, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(left * 1000):
            poller.unregister(fd)
            waiting.discard(fd)


def kill(machine: MachineDir, timeout: float = 5.0) -> None:
    """Kill the keeper (-9), and with it its processes; return when they have ended and the lock is free.

    Does nothing if there is none. Raises EngineError if they are still there after `timeout` seconds.
    """
    with killing(machine, timeout):
        pass


@contextlib.contextmanager
def killing(machine: MachineDir, timeout: float = 5.0) -> Iterator[None]:
    """The same, but the body runs while they end: the kernel takes some time to take namespaces and mounts down."""
    pid, start = identity(machine)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        pidfds: list[int] = []
        if pid and running(pid, start):  # a dead one, of whom nobody has taken note yet, has no children
            # A pidfd keeps meaning the process it was opened for, so what is checked after it is what is killed.
            for each in (pid, *children(pid)):
                with contextlib.suppress(ProcessLookupError):
                    pidfds.append(os.pidfd_open(each))
                    stack.callback(os.close, pidfds[-1])
            if start_time(pid) == start:
                for fd in pidfds:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
            else:
                pidfds.clear()
        try:
            yield
        finally:
            wait_for(pidfds, deadline)
            _wait_free(machine, deadline)


def _wait_free(machine: MachineDir, deadline: float) -> None:
    """Wait until the alive lock is free, and kill a keeper that was only starting."""
    while alive(machine):
        if time.monotonic() > deadline:
            raise EngineError(
                f"the keeper (process {identity(machine)[0]}) does not end",
                machine=machine.root.name,
                hint="see what it waits for in /proc",
            )
        time.sleep(LOOK / 10)  # a keeper that was starting had not written who it is yet
        pid, start = identity(machine)
        if pid and start_time(pid) == start:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    machine.line.unlink(missing_ok=True)
    machine.answer.unlink(missing_ok=True)


def ended(machine: MachineDir) -> Exit | None:
    """Return how the last life ended; None if it has not, or its keeper was killed. Raises StorageError if the record is damaged."""
    try:
        lines = machine.exit.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    record = dict(line.partition("=")[::2] for line in lines)
    try:
        bye = int(record["bye"]) if "bye" in record else None
        return Exit(record["how"], int(record["value"]), record["reason"], bye, int(record["ended_ns"]) / 1e9)
    except (KeyError, ValueError) as error:
        raise StorageError(f"{machine.exit} is damaged", machine=machine.root.name) from error


def stop(machine: MachineDir, *, grace: float, reason: str, timeout: float) -> None:
    """Ask the guest to shut down, have it killed after `grace` seconds, and return when the machine has ended.

    After `timeout` seconds the keeper itself is killed. Does nothing if the machine is not alive.
    """
    words = reason.encode()
    payload = struct.pack("<II", round(grace * 1000), len(words)) + words
    frame = struct.pack("<BBHII", 0x54, _KEEPER_STOP, 0, len(payload), 0) + payload
    deadline = time.monotonic() + timeout
    try:
        with _connect(machine, timeout) as line:
            line.sendall(frame)
            while (left := deadline - time.monotonic()) > 0:
                line.settimeout(left)
                if not line.recv(4096):
                    break
    except OSError:
        pass  # it has ended, or does not answer: either way what follows puts it right
    # Clients are let go when the line ends, which is before the exit record is written: a kill then would lose it.
    _wait_keeper(machine, deadline)
    kill(machine)


def _wait_keeper(machine: MachineDir, deadline: float) -> None:
    pid, start = identity(machine)
    try:
        fd = os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        return
    if fd >= 0:
        try:
            if start_time(pid) == start:
                wait_for([fd], deadline)
        finally:
            os.close(fd)


def _connect(machine: MachineDir, timeout: float) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    line.settimeout(timeout)
    folder = os.open(machine.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        line.connect(f"/proc/self/fd/{folder}/line.sock")
    except BaseException:
        line.close()
        raise
    finally:
        os.close(folder)
    return line
