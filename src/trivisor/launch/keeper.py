"""Starting, watching and ending a machine's keeper (`tvinit keep`, guest/PROTOCOL.md, "Plans").

A machine is alive if and only if its keeper holds `flock(alive)`. The lock is taken here, before the keeper is
started, and passes to it with the descriptor: there is no moment in which the machine runs unlocked.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.paths import MachineDir
from trivisor.core.process import TAIL, glance, running, start_time
from trivisor.core.units import MIB
from trivisor.launch import tvinit
from trivisor.launch.alive import LOOK, alive, lock_alive, open_alive
from trivisor.launch.plan import Op, Plan, encode

__all__ = ["Exit", "Kept", "Process", "alive", "ended", "kill", "spawn", "stop"]

_KEEPER_STOP = 0x43
_KEEP_TIMEOUT = 10.0
_CHILDREN = 4096
"""Bytes of the pids of a keeper's processes, which are ten at most."""


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


def _bind(folder: int, name: str, kind: socket.SocketKind) -> socket.socket:
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
        with contextlib.suppress(ChildProcessError):  # the caller's process ignores SIGCHLD: nobody learns the status
            fd = os.pidfd_open(self.pid)
            try:
                _wait_for([fd], time.monotonic() + _KEEP_TIMEOUT)
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


def _await(reports: _Ready, begin: Callable[[], object] | None) -> int:
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
                begin()
        elif word == "synced":
            return engine
        else:
            raise EngineError(rest or line)


def _identity(machine: MachineDir) -> tuple[int, int]:
    """Return (pid, start time) of the keeper that last ran; (0, 0) if there was none."""
    try:
        pid, start = glance(machine.keeper).split()
        return int(pid), int(start)
    except (FileNotFoundError, ValueError):
        return 0, 0


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
    listener = stack.enter_context(_bind(folder, machine.line.name, socket.SOCK_STREAM))
    given = {"folder": folder, "alive": alive_fd, "listen": listener.fileno(), line[0]: line[1]}
    if answer is not None:
        given["answer"] = answer
        given["answer-listen"] = stack.enter_context(_bind(folder, machine.answer.name, socket.SOCK_SEQPACKET)).fileno()
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
    begin: Callable[[], object] | None = None,
    answer: int | None = None,
) -> Kept:
    """Start the keeper of the machine in this folder, with its processes, and return when the guest has answered.

    `line_fd` is the host's end of the line or, if `dialled`, a bound socket that the guest calls. `logs` maps a log's name
    to the pipe that it is read from, `fds` are all descriptors that the plans name; the caller closes its own copies
    afterwards. `owner` is the pid whose end ends the machine. `ttl`, `idle`, `grace` and `wait` are seconds. `begin` is
    called when the engine runs, before the guest can have answered: to let it go on from a frozen state. `answer` is the
    answerer's end of the pair by which PID 1 hands over what it is to answer (SOCK_SEQPACKET); without it there is none. Raises Busy if
    the machine is alive, StorageError if its folder cannot be written, and EngineError, with the end of the engine's
    log, if it does not come up: nothing runs then.
    """
    log_start = _log_size(machine)
    with contextlib.ExitStack() as ours:
        try:
            with contextlib.ExitStack() as given:
                ready, fixed = _start(given, machine, ("line-listen" if dialled else "line", line_fd), owner, answer)
                ours.callback(os.close, ready)
                plan = encode(_plan(processes, fixed, logs, log_cap, {"ttl": ttl, "idle": idle, "grace": grace}))
                starting = _run_keeper(ours, plan, [*fixed.values(), *logs.values(), *fds])
        except OSError as error:
            raise StorageError(f"{machine.root} cannot be used: {error.strerror}", machine=machine.root.name) from error
        try:
            engine = _await(_Ready(ready, time.monotonic() + wait), begin)
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
        return Kept(_identity(machine)[0], engine)


def _children(pid: int) -> list[int]:
    """Return the processes that the keeper runs (proc(5), "children")."""
    try:
        return [int(child) for child in glance(f"/proc/{pid}/task/{pid}/children", _CHILDREN).split()]
    except OSError:
        return []


def _wait_for(pidfds: Sequence[int], deadline: float) -> None:
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
    pid, start = _identity(machine)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        pidfds = []
        if pid and running(pid, start):  # a dead one, of whom nobody has taken note yet, has no children
            # A pidfd keeps meaning the process it was opened for, so what is checked after it is what is killed.
            for each in (pid, *_children(pid)):
                with contextlib.suppress(ProcessLookupError):
                    pidfds.append(os.pidfd_open(each))
                    stack.callback(os.close, pidfds[-1])
            if start_time(pid) == start:
                for fd in pidfds:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                _wait_for(pidfds, deadline)
    while alive(machine):
        if time.monotonic() > deadline:
            raise EngineError(f"the keeper (process {pid}) does not end", machine=machine.root.name, hint="see what it waits for in /proc")
        time.sleep(LOOK / 10)  # a keeper that was starting had not written who it is yet
        pid, start = _identity(machine)
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
    pid, start = _identity(machine)
    try:
        fd = os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        return
    if fd >= 0:
        try:
            if start_time(pid) == start:
                _wait_for([fd], deadline)
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
