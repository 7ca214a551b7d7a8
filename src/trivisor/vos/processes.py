"""Commands in a machine: exec runs one to its end, spawn hands it over running.

A command is argv; a str is a line for /bin/sh. Which line to use is asked anew for each command, so a machine that
was stopped and started again, or a line that failed, needs nothing from the caller.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from trivisor.core.errors import ExecFailed, InvalidSpec
from trivisor.vos import wire
from trivisor.vos.capture import QUIET_WAKE, Capture, Sink, Stdin
from trivisor.vos.command import Command
from trivisor.vos.line import Line
from trivisor.vos.process import Process
from trivisor.vos.syscalls.attaching import Attaching
from trivisor.vos.syscalls.compile import Compiled
from trivisor.vos.syscalls.policy import Policy
from trivisor.vos.syscalls.records import Decoder
from trivisor.vos.syscalls.service import Syscalls
from trivisor.vos.syscalls.supervisor import step_aside
from trivisor.vos.syscalls.trace import Filter, Trace
from trivisor.vos.wire import STDERR, STDOUT, Flag

MAX_OUTPUT = 256 << 20
"""Bytes of each output that exec keeps unless told otherwise."""
MAX_TRACED = 16 << 20
"""Bytes of each output of a traced command that are kept."""
START_TIMEOUT = 60.0
"""Seconds until a spawned command must have started; a machine may be slow, or paused by someone else."""

Argv = str | Sequence[str]


@dataclass(frozen=True)
class ExecResult:
    """How a command went. `exit_code` is its status, or 128 + n and `signal` n if signal n killed it.

    127: no such program; 126: it cannot be executed. Seconds of wall clock on the host (`duration`) and of processor in
    the machine (`user_seconds`, `system_seconds`); `peak_memory` is bytes. `truncated`: more was streamed than is kept.
    """

    argv: tuple[str, ...]
    exit_code: int
    signal: int | None
    stdout: bytes
    stderr: bytes
    duration: float
    user_seconds: float
    system_seconds: float
    peak_memory: int
    truncated: bool = False
    out_of_memory: bool = False
    """It was killed (SIGKILL), and the machine's memory ran out since it was started."""

    @property
    def ok(self) -> bool:
        """True if the exit code is 0."""
        return self.exit_code == 0

    @property
    def text(self) -> str:
        """stdout as text (UTF-8; what is not becomes U+FFFD)."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self) -> str:
        """stderr as text."""
        return self.stderr.decode("utf-8", "replace")


class _More(TypedDict, total=False):
    """What an EXEC request has beside what every command has."""

    size: tuple[int, int]
    policy: Sequence[Sequence[str]] | None
    stop: int


class Processes:
    """Runs commands in one machine. Thread-safe. `env` lies under the env of each command; `starved` says of a machine in which
    one was killed whether its memory ran out. `user` and `cwd` are those of commands that are given none."""

    def __init__(
        self,
        line_of: Callable[[], Line],
        machine: str,
        env: Mapping[str, str] | None = None,
        syscalls: Syscalls | None = None,
        starved: Callable[[], bool] | None = None,
        *,
        user: str = "",
        cwd: str = "",
    ) -> None:
        self.machine = machine
        self._user, self._cwd = user, cwd
        self._starved = starved
        self._syscalls = syscalls
        self._line_of = line_of
        self._env = dict(env or {})

    def exec(
        self,
        argv: Argv,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: Stdin = b"",
        timeout: float | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
        check: bool = False,
        max_output: int = MAX_OUTPUT,
        policy: Policy | None = None,
    ) -> ExecResult:
        """Run `argv` to its end.

        `user` is a name or uid, with `:group` if wanted (the image's unless given, else root); `cwd` the image's unless given, else the
        user's home.
        `stdin` is bytes, text, a binary file or an iterable of bytes; empty means /dev/null. `on_stdout` and `on_stderr`
        are called with bytes as they come. At most `max_output` bytes of each output are kept: more is an error, but
        with a callback the rest is only not kept. `policy` says what it, and what it starts, gets from system calls.

        Raises ExecTimeout after `timeout` seconds (the process group is killed), ExecFailed with `check` if the exit
        code is not 0, GuestError if the guest refuses (no such user or cwd), GuestGone and GuestProtocolError if the
        line fails, InvalidSpec and UnsupportedByWall for a policy. What a callback or `stdin` raises kills the command
        and goes through; so does Ctrl-C.
        """
        words = _words(argv)
        capture = Capture(self.machine, max_output, {STDOUT: on_stdout, STDERR: on_stderr})
        compiled = self._compiled(policy)
        operations = compiled.operations if compiled else None
        request = self._request(words, env, _stdin_flag(stdin), user=user, cwd=cwd, policy=operations)
        result = self._run(words, request, capture, stdin, timeout, compiled)
        if check and not result.ok:
            raise ExecFailed(self.machine, result, _failure(result))
        return result

    def spawn(
        self,
        argv: Argv,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        pty: bool = False,
        size: tuple[int, int] = (24, 80),
        stdin: bool = True,
        detach: bool = False,
        policy: Policy | None = None,
    ) -> Process:
        """Start `argv` and return it running.

        With `pty` it has a terminal of `size` (rows, columns). It is killed when this process leaves the line, unless
        `detach`. `stdin=False` gives it /dev/null. Raises as exec does.
        """
        words = _words(argv)
        flags = (Flag.PTY if pty else 0) | (Flag.DETACH if detach else 0) | (0 if stdin else Flag.NO_STDIN)
        compiled = self._compiled(policy)
        operations = compiled.operations if compiled else None
        request = self._request(words, env, flags, size=size if pty else (0, 0), user=user, cwd=cwd, policy=operations)
        return self._start(words, request, pty=pty, compiled=compiled)

    def launch(self, argv: Argv, stop: int, *, env: Mapping[str, str] | None = None, cwd: str = "", user: str = "") -> Process:
        """Start `argv` as the machine's program (PROTOCOL.md), with its stop signal. Its output goes to the keeper's log alone."""
        words = _words(argv)
        compiled = self._compiled(None)
        operations = compiled.operations if compiled else None
        flags = Flag.DETACH | Flag.NO_STDIN
        request = self._request(words, env, flags, user=user, cwd=cwd, policy=operations, stop=stop)
        return self._start(words, request, pty=False, compiled=compiled)

    def trace(
        self,
        argv: Argv,
        policy: Policy,
        keep: Filter,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: Stdin = b"",
        timeout: float | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
    ) -> Trace:
        """Run `argv` under a policy that traces (vos.syscalls.service.Syscalls.trace)."""
        words = _words(argv)
        compiled = self._compiled(policy, traced=True)
        assert self._syscalls is not None  # or a policy would not have been taken
        capture = Capture(self.machine, MAX_TRACED, {STDOUT: on_stdout or _forget, STDERR: on_stderr or _forget})
        operations = compiled.operations if compiled else None
        request = self._request(words, env, _stdin_flag(stdin), user=user, cwd=cwd, policy=operations)
        deadline = None if timeout is None else time.monotonic() + timeout
        command = Command.start(self._line_of(), request, deadline, traced=True)
        self._answering(command, compiled, deadline)
        decoder = Decoder(self._syscalls.architecture)
        return Trace(command, words, capture, decoder, keep, stdin, timeout, self._syscalls.untraceable)

    def builtin(self, argv: Sequence[str], *, user: str = "", stdin: bool = False) -> Process:
        """Start one of the guest's own commands (PROTOCOL.md, "Builtins")."""
        words = tuple(argv)
        request = wire.exec_request(words, (), flags=Flag.BUILTIN | (0 if stdin else Flag.NO_STDIN), user=user)
        return self._start(words, request, pty=False)

    def run_builtin(
        self,
        argv: Sequence[str],
        *,
        user: str = "",
        stdin: Stdin = b"",
        timeout: float | None = None,
        limit: int = MAX_OUTPUT,
        hint: str = "",
    ) -> ExecResult:
        """Run one of the guest's own commands to its end. `hint` goes with the error if it writes more than `limit`."""
        words = tuple(argv)
        request = wire.exec_request(words, (), flags=Flag.BUILTIN | _stdin_flag(stdin), user=user)
        return self._run(words, request, Capture(self.machine, limit, {STDOUT: None, STDERR: None}, hint), stdin, timeout)

    def _compiled(self, policy: Policy | None, *, traced: bool = False) -> Compiled | None:
        if policy is not None and policy.tracing and not traced:
            raise InvalidSpec("nobody would get the events of this policy's trace", hint="use syscalls.trace of the machine")
        if self._syscalls is not None:
            return self._syscalls.compiled(policy)
        if policy is not None:
            raise InvalidSpec("these commands take no policy", hint="use exec and spawn of the machine")
        return None

    def _answering(self, command: Command, compiled: Compiled | None, deadline: float | None) -> None:
        """Have the handlers of what was compiled answer `command`, which is under way: return when they do, or it is over."""
        step_aside()
        if compiled is None or compiled.policy is None or self._syscalls is None:
            return
        attaching = Attaching(self._syscalls, compiled, command)
        try:
            attaching.wait(deadline)
        except BaseException:
            command.abort()
            raise

    def _run(
        self,
        words: tuple[str, ...],
        request: bytes,
        capture: Capture,
        stdin: Stdin,
        timeout: float | None,
        compiled: Compiled | None = None,
    ) -> ExecResult:
        began = time.monotonic()
        deadline = None if timeout is None else began + timeout
        command = Command.start(self._line_of(), request, deadline, QUIET_WAKE if capture.quiet else 1)
        self._answering(command, compiled, deadline)
        capture.run(command, stdin, timeout, deadline)
        return self._result(words, command, capture, time.monotonic() - began)

    def _start(self, words: tuple[str, ...], request: bytes, *, pty: bool, compiled: Compiled | None = None) -> Process:
        deadline = time.monotonic() + START_TIMEOUT
        command = Command.start(self._line_of(), request, deadline)
        self._answering(command, compiled, deadline)
        try:
            pid = command.started(START_TIMEOUT)
        except KeyboardInterrupt:
            command.abort()
            raise
        return Process(command, words, pid, pty=pty, starved=self._starved)

    def _request(
        self, words: Sequence[str], env: Mapping[str, str] | None, flags: int, *, user: str, cwd: str, **more: Unpack[_More]
    ) -> bytes:
        return wire.exec_request(words, self._environment(env), flags=flags, user=user or self._user, cwd=cwd or self._cwd, **more)

    def _environment(self, env: Mapping[str, str] | None) -> list[str]:
        merged = {**self._env, **(env or {})}
        for key, value in merged.items():
            if not isinstance(key, str) or not isinstance(value, str) or not key or "=" in key:
                raise InvalidSpec(f"env {key!r} is not a name and a text", hint='for example env={"LANG": "C.UTF-8"}')
        return [f"{key}={value}" for key, value in merged.items()]

    def _result(self, words: tuple[str, ...], command: Command, capture: Capture, duration: float) -> ExecResult:
        exited = command.exited
        assert exited is not None
        killed = signal.SIGKILL in (exited.signal, exited.exit_code - 128)
        return ExecResult(
            argv=words,
            exit_code=exited.exit_code,
            signal=exited.signal,
            stdout=capture.output(STDOUT),
            stderr=capture.output(STDERR),
            duration=duration,
            user_seconds=exited.user_seconds,
            system_seconds=exited.system_seconds,
            peak_memory=exited.peak_memory,
            truncated=capture.truncated,
            out_of_memory=killed and self._starved is not None and self._starved(),
        )


def _forget(_part: bytes) -> None:
    """Take output that nobody asked for: Capture keeps the beginning of it."""


def _words(argv: Argv) -> tuple[str, ...]:
    if isinstance(argv, str):
        return ("/bin/sh", "-c", argv)
    words = tuple(argv)
    if not words or not all(isinstance(word, str) for word in words) or not words[0]:
        raise InvalidSpec(f"{argv!r} is not a command", hint='give a list of texts such as ["ls", "-l"], or one line for /bin/sh')
    return words


def _stdin_flag(stdin: Stdin) -> int:
    empty = isinstance(stdin, bytes | bytearray | memoryview | str) and not stdin
    return Flag.NO_STDIN if empty else 0


def _failure(result: ExecResult) -> str:
    last = result.error_text.strip().splitlines()[-1:]
    how = f"killed by signal {result.signal}" if result.signal else f"exit status {result.exit_code}"
    how += ": out of memory" if result.out_of_memory else ""
    words = re.sub(r"\s+", " ", " ".join(result.argv))
    return f"{words[:80]}: {how}" + (f": {last[0][:200]}" if last else "")
