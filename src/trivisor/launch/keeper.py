"""Starting a machine's keeper (`tvinit keep`, guest/PROTOCOL.md, "Plans"); what ends it (ending.py) goes by this module's name, too.

A machine is alive if and only if its keeper holds `flock(alive)`. The lock is taken here, before the keeper is
started, and passes to it with the descriptor: there is no moment in which the machine runs unlocked.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.paths import MachineDir
from trivisor.core.process import TAIL
from trivisor.core.units import MIB
from trivisor.launch import tvinit
from trivisor.launch.alive import alive, lock_alive, open_alive
from trivisor.launch.ending import Exit, ended, identity, kill, killing, stop, wait_for
from trivisor.launch.plan import Op, Plan, encode

__all__ = ["Exit", "Kept", "Process", "alive", "ended", "kill", "killing", "spawn", "stop"]

_KEEP_TIMEOUT = 10.0


@dataclass(frozen=True)
class Process:
    """A program that the keeper runs. The last of a list is the engine."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class Kept:
    """What `spawn` started: process ids on the host."""

    keeper_pid: int
    engine_pid: int


def bind(folder: int, name: str, kind: socket.SocketKind) -> socket.socket:
    """Bind a socket in the folder; through its descriptor, since a socket's path may have only 107 bytes."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{name}")
        os.chmod(name, 0o600, dir_fd=folder)
    except BaseException:
        listener.close()
        raise
    return listener


def _plan(
    processes: Sequence[Process],
    fixed: Mapping[str, int],
    logs: Mapping[str, int],
    log_cap: int,
    limits: Mapping[str, float | None],
) -> Plan:
    plan: list[Op] = [(name, str(fd)) for name, fd in fixed.items()]
    plan += [("log", name, str(fd), str(log_cap)) for name, fd in logs.items()]
    plan.append(("init-log", str(log_cap)))
    plan += [(name, str(max(1, round(seconds * 1000)))) for name, seconds in limits.items() if seconds is not None]
    for process in processes:
        plan += [("process", process.name), *process.plan]
    return tuple(plan)


def _log_tail(machine: MachineDir, start: int) -> str:
    """What this life's engine wrote to its log."""
    try:
        with open(machine.log("engine"), "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(start if start <= size else 0, size - TAIL))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _log_size(machine: MachineDir) -> int:
    try:
        return machine.log("engine").stat().st_size
    except FileNotFoundError:
        return 0


class _Ready:
    """Reads the keeper's reports from its ready pipe, line by line, until a deadline."""

    def __init__(self, fd: int, deadline: float) -> None:
        self._fd = fd
        self._deadline = deadline
        self._rest = b""

    def begin(self, wait: float) -> None:
        """Have the deadline be in `wait` seconds."""
        self._deadline = time.monotonic() + wait

    def line(self) -> str | None:
        """Return the next line; None when the keeper has said its last. Raises TimeoutError."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        while b"\n" not in self._rest:
            left = self._deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError
            data = os.read(self._fd, 4096)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")


@dataclass(frozen=True)
class _Starting:
    """`tvinit keep` until it has become a daemon: a process that ends at once, or says on its stderr why it cannot."""

    command: list[str]
    pid: int
    said: int

    def fault(self) -> EngineError | None:
        """Wait for its end, and return what it failed for."""
        status = -1
        # The caller's process ignores SIGCHLD: nobody learns the status, and it may have ended already.
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            fd = os.pidfd_open(self.pid)
            try:
                wait_for([fd], time.monotonic() + _KEEP_TIMEOUT)
            finally:
                os.close(fd)
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if not done:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                status = signal.SIGKILL
        code = os.waitstatus_to_exitcode(status) if status >= 0 else 0
        if code == 0:
            return None
        output = os.pread(self.said, TAIL, 0).decode(errors="replace")
        return EngineError("the keeper did not start", command=self.command, status=code, output=output)


def _run_keeper(stack: contextlib.ExitStack, plan: bytes, fds: Sequence[int]) -> _Starting:
    """Start `tvinit keep`. It has nothing of ours but `fds`, not even the environment."""
    memory = os.memfd_create("plan")
    stack.callback(os.close, memory)
    os.pwrite(memory, plan, 0)
    said = os.memfd_create("said")
    stack.callback(os.close, said)
    command = [str(tvinit.path()), "keep", str(memory)]
    standard = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    # A descriptor put in its own place is no longer closed at exec (posix_spawn_file_actions_adddup2(3)).
    inherited = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (memory, *fds)]
    try:
        pid = os.posix_spawn(command[0], command, {}, file_actions=[*standard, (os.POSIX_SPAWN_DUP2, said, 2), *inherited])
    except OSError as error:
        raise EngineError("the keeper cannot be started", command=command, output=str(error)) from error
    return _Starting(command, pid, said)


def _await(reports: _Ready, begin: Callable[[int], object] | None, wait: float) -> int:
    """Wait for `started` and `synced`; return the engine's pid. Raises EngineError with what the keeper says else."""
    engine = 0
    while True:
        line = reports.line()
        if line is None:
            raise EngineError("the keeper ended before the guest answered")
        word, _, rest = line.partition(" ")
        if word == "started":
            engine = int(rest)
            if begin is not None:
                begin(engine)
                reports.begin(wait)
        elif word == "synced":
            return engine
        else:
            raise EngineError(rest or line)


def _start(
    stack: contextlib.ExitStack, machine: MachineDir, line: tuple[str, int], owner: int | None, answer: int | None
) -> tuple[int, dict[str, int]]:
    """Lock, bind and open all that the keeper is given. Returns our end of the ready pipe, and the rest by name."""
    alive_fd = stack.enter_context(open_alive(machine, os.O_RDWR | os.O_CREAT))
    lock_alive(machine, alive_fd)
    for record in (machine.exit, machine.keeper):
        record.unlink(missing_ok=True)
    folder = os.open(machine.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, folder)
    listener = stack.enter_context(bind(folder, machine.line.name, socket.SOCK_STREAM))
    given = {"folder": folder, "alive": alive_fd, "listen": listener.fileno(), line[0]: line[1]}
    if answer is not None:
        given["answer"] = answer
        given["answer-listen"] = stack.enter_context(bind(folder, machine.answer.name, socket.SOCK_SEQPACKET)).fileno()
    if owner is not None:
        try:
            given["owner"] = os.pidfd_open(owner)
        except ProcessLookupError as error:
            raise EngineError(f"the owner, process {owner}, has ended", machine=machine.root.name) from error
        stack.callback(os.close, given["owner"])
    ready, given["ready"] = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, given["ready"])
    return ready, given


def spawn(
    machine: MachineDir,
    *,
    processes: Sequence[Process],
    line_fd: int,
    dialled: bool = False,
    logs: Mapping[str, int],
    fds: Sequence[int],
    log_cap: int = 4 * MIB,
    owner: int | None = None,
    ttl: float | None = None,
    idle: float | None = None,
    grace: float = 10.0,
    wait: float = 60.0,
    begin: Callable[[int], object] | None = None,
    answer: int | None = None,
    oom: int | None = None,
) -> Kept:
    """Start the keeper of the machine in this folder, with its processes, and return when the guest has answered.

    `line_fd` is the host's end of the line or, if `dialled`, a bound socket that the guest calls. `logs` maps a log's name
    to the pipe that it is read from, `fds` are all descriptors that the plans name; the caller closes its own copies
    afterwards. `owner` is the pid whose end ends the machine. `ttl`, `idle`, `grace` and `wait` are seconds. `begin` is
    called with the engine's pid when it runs, before the guest can have answered: to let it go on from a frozen state; `wait`
    begins anew when it returns. `answer` is the
    answerer's end of the pair by which PID 1 hands over what it is to answer (SOCK_SEQPACKET); without it there is none. `oom` is an
    eventfd that tells of the end of the machine's memory, which is then its own. Raises Busy if the machine is alive, StorageError
    if its folder cannot be written, and EngineError, with the end of the engine's log, if it does not come up: nothing runs then.
    """
    log_start = _log_size(machine)
    with contextlib.ExitStack() as ours:
        try:
            with contextlib.ExitStack() as given:
                ready, fixed = _start(given, machine, ("line-listen" if dialled else "line", line_fd), owner, answer)
                ours.callback(os.close, ready)
                fixed |= {"oom": oom} if oom is not None else {}
                plan = encode(_plan(processes, fixed, logs, log_cap, {"ttl": ttl, "idle": idle, "grace": grace}))
                starting = _run_keeper(ours, plan, [*fixed.values(), *logs.values(), *fds])
        except OSError as error:
            raise StorageError(f"{machine.root} cannot be used: {error.strerror}", machine=machine.root.name) from error
        try:
            engine = _await(_Ready(ready, time.monotonic() + wait), begin, wait)
        except BaseException as error:
            unable = starting.fault()
            kill(machine)
            if unable is not None:
                raise unable from error
            if isinstance(error, TimeoutError):
                fault = f"the guest did not answer within {wait:g} s"
            elif isinstance(error, EngineError):
                fault = error.message
            else:
                raise
            log, name = machine.log("engine"), machine.root.name
            raise EngineError(fault, output=_log_tail(machine, log_start), machine=name, hint=f"the whole log is {log}") from error
        starting.fault()
        return Kept(identity(machine)[0], engine)
