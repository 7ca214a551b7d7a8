"""`vm.syscalls`: what one machine's programs get from their system calls, as the process that holds the machine has it.

Rules and paths are the machine's, written down with its spec: they hold whoever starts a command, after a stop and a start, and
after all of us have gone. Handlers are this process's: they answer the commands that it starts, while it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from trivisor.core.errors import InvalidSpec, UnsupportedByWall
from trivisor.core.rules import Paths, Rule, SyscallSpec
from trivisor.vos.capture import Sink, Stdin
from trivisor.vos.ports import FEATURES, SyscallPort
from trivisor.vos.process import Process
from trivisor.vos.syscalls.compile import Compiled, compile_exec
from trivisor.vos.syscalls.policy import Handler, Policy
from trivisor.vos.syscalls.trace import Filter, Trace


class Answering(Protocol):
    """Handlers that answer one command's calls, until it has ended."""

    def close(self) -> None: ...


Start = Callable[..., Trace]
"""Processes.trace of the machine."""
Attach = Callable[[Compiled], Answering]
"""Have the handlers of what was compiled answer the command that bears its token. Raises GuestError."""


class Held:
    """What this process holds of one machine: the handlers that go with each of its commands."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.carriers: list[Process] = []
        """Builtins that carry listeners over the line, while they have none (remote.py)."""


class Syscalls:
    """The system calls of one machine."""

    def __init__(
        self, machine: str, spec: SyscallSpec | None, port: Callable[[], SyscallPort], held: Held, attach: Attach, start: Start
    ) -> None:
        self._machine = machine
        self._spec = spec
        self._port = port
        self._held = held
        self._attach = attach
        self._start = start

    def untraceable(self, why: str) -> UnsupportedByWall:
        """Return the error for a guest whose kernel, or whose runsc, could not trace a command after all."""
        what, walls = FEATURES["trace"]
        wall = self._port().wall
        return UnsupportedByWall(f"{what}: {why}", wall, [other for other in walls if other != wall], machine=self._machine)

    @property
    def architecture(self) -> str:
        """The guest's, as os.uname() names it; "" the host's."""
        return self._port().machine

    @property
    def features(self) -> frozenset[str]:
        """What this machine's wall can: kernel, notify, landlock, log, trace, no-vdso (vos/ports.py)."""
        return self._port().features

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The machine's own rules, which come before those of a command."""
        return self._spec.rules if self._spec else ()

    @property
    def paths(self) -> Paths | None:
        """The only places that the machine's programs may use, if that was asked for."""
        return self._spec.paths if self._spec else None

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """The handlers that `use` was given."""
        return self._held.policy.handlers if self._held.policy else ()

    def use(self, policy: Policy | None) -> None:
        """Have `policy` go with each command that this process starts in the machine from now on; None: no longer.

        Rules that shall hold whoever starts a command are the machine's: give them when it is made. Raises
        InvalidSpec for what contradicts the machine's rules, UnsupportedByWall.
        """
        if policy is not None:
            if policy.tracing:
                raise InvalidSpec("a policy that traces goes with one command", hint="use trace")
            compile_exec(self._port(), self._spec, policy, self._machine)
            policy = policy.copy()
        self._held.policy = policy

    def trace(
        self,
        argv: str | Sequence[str],
        calls: Sequence[str] = (),
        *,
        keep: Filter | None = None,
        no_vdso: bool = False,
        buffer: int = 64,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: Stdin = b"",
        timeout: float | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
        policy: Policy | None = None,
    ) -> Trace:
        """Run `argv` and return an iterator over the calls that it and what it starts make, as they happen; `calls` names those to
        trace, all unless given. The rest of the program runs at full speed then, but for a stop at each fork, exec and signal.

        `keep` filters further. `no_vdso` has programs find no vDSO, so that clock reads are calls. `buffer` bytes of a buffer are
        copied at most. The others are as of exec; what the command writes is kept (up to 16 MiB), or given to the callbacks.

        Raises InvalidSpec for a call that there is not, UnsupportedByWall, and what exec raises.
        """
        traced = policy.copy() if policy else Policy()
        traced.trace(*((calls,) if isinstance(calls, str) else calls), no_vdso=no_vdso, buffer=buffer)
        return self._start(
            argv,
            traced,
            keep or Filter(),
            env=env,
            cwd=cwd,
            user=user,
            stdin=stdin,
            timeout=timeout,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
        )

    def compiled(self, policy: Policy | None = None) -> Compiled | None:
        """Return what goes with a command that is given `policy`; None if nothing does. Raises InvalidSpec, UnsupportedByWall."""
        if policy is not None and not isinstance(policy, Policy):
            raise InvalidSpec(f"policy must be a Policy, not {policy!r}", hint="for example Policy('write:ENOSPC,path=/data/*')")
        if policy is None and self._spec is None and self._held.policy is None:
            return None
        both = self._held.policy.joined(policy) if self._held.policy and policy else policy or self._held.policy
        return compile_exec(self._port(), self._spec, both, self._machine)

    def attach(self, compiled: Compiled) -> Answering:
        """Have the handlers in `compiled` answer its command, which has begun."""
        return self._attach(compiled)
