"""Every error that Trivisor raises.

    TrivisorError
    ├── CallerError              the call was wrong; the same call will fail again
    │   ├── InvalidSpec          a value that no machine can have
    │   ├── InvalidState         the verb is not legal in the machine's state
    │   ├── NotFound             no such machine, image, file or process
    │   ├── AlreadyExists        the name is taken
    │   ├── Busy                 another operation holds the machine
    │   ├── PoolClosed           the pool was closed, or is another process's
    │   ├── RecipeError          a Containerfile says what no build can do; the error names the line
    │   └── UnsupportedByWall    this wall cannot; the error names the walls that can
    ├── HostError                the host, or a program on it, failed
    │   ├── EngineError          a program failed: command, exit status, last output
    │   ├── HostLacks            something is not installed or not permitted here
    │   ├── OverBudget           the home's memory budget has no room; the error names who holds what
    │   ├── PoolEmpty            a pool has no machine to give; the error says why
    │   ├── StorageError         the disk is full, the home is read-only, a file is damaged
    │   ├── RegistryError        a registry, or the way to it, failed: its status
    │   ├── MigrationError       a machine could not be moved; the error says where it is now
    │   └── ImageError           an image that cannot be read or is not safe to unpack
    └── GuestError               what runs in the machine failed or misbehaved
        ├── ExecTimeout          a command outlived its timeout and was killed
        ├── ExecFailed           `check=True` and the command's exit status is not 0
        ├── BuildFailed          a step of a build failed in its machine; the error names the line
        ├── FileError            a file operation in the machine failed: errno and path
        ├── WaitTimeout          the machine did not end in the time given
        ├── GuestShort           the guest gave back less memory than it was asked for; the error says how much
        ├── BadArgument          a program's system call points nowhere, or to too much
        ├── BadAddress           there is no memory at an address in the machine
        ├── CallGone             the program died, or was interrupted, while its call was held
        ├── GuestProtocolError   the guest sent what the protocol does not allow
        └── GuestGone            the line to the machine closed

Each says what happened, to which machine, and in `hint` what to do next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence


class TrivisorError(Exception):
    """The root of the tree. `machine` is a name or id, `hint` the next step; either may be empty."""

    def __init__(self, message: str, *, machine: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.machine = machine
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.machine}: " if self.machine and self.machine not in self.message else ""
        return f"{where}{self.message}"


class CallerError(TrivisorError):
    """The call itself was wrong."""


class InvalidSpec(CallerError, ValueError):
    """A value that no machine can have."""


_NAMED = 5
"""Holders of memory that an error names."""
_ON_A_MACHINE = {
    "exec": "run a command in",
    "spawn": "run a command in",
    "files": "reach the files of",
    "forward": "forward a port of",
    "stats": "read the figures of",
    "attach": "attach a device to",
    "detach": "detach a device from",
    "memory": "reach the memory of",
    "limit": "change the limits of",
    "modify": "change",
    "migrate": "move",
    "network": "change the network of",
    "capture": "capture the packets of",
}


class InvalidState(CallerError):
    """`verb` is not legal in `state`; `legal` lists the states in which it is."""

    def __init__(self, machine: str, state: str, verb: str, legal: Iterable[str]) -> None:
        self.state = state
        self.verb = verb
        self.legal = tuple(legal)
        super().__init__(
            f"cannot {_ON_A_MACHINE.get(verb, verb)} machine {machine}: it is {state}",
            machine=machine,
            hint=f"{verb} is legal when the machine is {' or '.join(self.legal)}",
        )


class NotFound(CallerError, LookupError):
    """No such machine, image, file or process."""


class AlreadyExists(CallerError):
    """The name is taken."""


class Busy(CallerError):
    """Another operation holds the machine; `operation` names it."""

    def __init__(self, machine: str, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"machine {machine} is busy: {operation}",
            machine=machine,
            hint="wait for that operation to end, or delete with force",
        )


class PoolClosed(CallerError):
    """The pool was closed, or is another process's."""


class RecipeError(CallerError):
    """The Containerfile `file` says at `line` (from 1) what no build can do."""

    def __init__(self, file: str, line: int, message: str, *, hint: str = "") -> None:
        self.file = file
        self.line = line
        super().__init__(f"{file}:{line}: {message}", hint=hint)


class UnsupportedByWall(CallerError):
    """`wall` cannot do `what`; `walls` lists those that can."""

    def __init__(self, what: str, wall: str, walls: Iterable[str] = (), *, machine: str = "") -> None:
        self.wall = wall
        self.walls = tuple(walls)
        able = f"these walls can: {', '.join(self.walls)}" if self.walls else "no wall can on this host"
        super().__init__(f"the {wall} wall cannot {what}", machine=machine, hint=able)


class HostError(TrivisorError):
    """The host, or a program on it, failed."""


class EngineError(HostError):
    """A program failed: `command`, `status` (None if it never ran), and the end of its `output`."""

    def __init__(
        self,
        message: str,
        *,
        command: Sequence[str] = (),
        status: int | None = None,
        output: str = "",
        machine: str = "",
        hint: str = "",
    ) -> None:
        self.command = tuple(command)
        self.status = status
        self.output = output
        last = output.strip().splitlines()[-1:] or [""]
        super().__init__(f"{message}: {last[0]}" if last[0] else message, machine=machine, hint=hint)


class HostLacks(HostError):
    """Something that is needed is not installed or not permitted; `hint` is the remedy."""


class OverBudget(HostError):
    """The home's memory budget has no room for `wanted` bytes: `lacking` are missing. `holders` are (name, bytes), the largest first."""

    def __init__(self, budget: int, wanted: int, holders: Sequence[tuple[str, int]], lacking: int) -> None:
        self.budget = budget
        self.wanted = wanted
        self.holders = tuple(holders)
        self.lacking = lacking
        named = ", ".join(f"{name} {size >> 20}M" for name, size in self.holders[:_NAMED])
        more = f" and {len(self.holders) - _NAMED} more" if len(self.holders) > _NAMED else ""
        message = f"{wanted >> 20}M do not fit into the home's memory budget of {budget >> 20}M"
        hint = "stop or pause one of them, or raise the budget" if holders else "raise the budget, or ask for less"
        super().__init__(f"{message}: held by {named}{more}" if holders else message, hint=hint)


class PoolEmpty(HostError):
    """A pool has no machine to give: none was made in time, or none can be."""


class StorageError(HostError):
    """The disk is full, the home is read-only, or a stored file is damaged."""


class RegistryError(HostError):
    """A registry, or the network on the way to it, failed. `status` is its HTTP status, 0 if none; `transient`: later it may not."""

    def __init__(self, message: str, *, status: int = 0, hint: str = "", transient: bool = False) -> None:
        self.status = status
        self.transient = transient
        super().__init__(message, hint=hint)


class MigrationError(HostError):
    """A machine could not be moved to another home. `where` it is now: "here" (it goes on as before), "there", or "unknown", which is
    when it was given up and nothing came back: it stands still here."""

    def __init__(self, message: str, *, where: str = "here", machine: str = "", hint: str = "") -> None:
        self.where = where
        super().__init__(message, machine=machine, hint=hint)


class ImageError(HostError):
    """An image that cannot be read, or that is not safe to unpack."""


class GuestError(TrivisorError):
    """What runs in the machine failed or misbehaved."""


class ExecTimeout(GuestError, TimeoutError):
    """A command outlived its `timeout` (seconds) and its process group was killed.

    `stdout` and `stderr` hold what it had written until then.
    """

    def __init__(self, machine: str, timeout: float, stdout: bytes = b"", stderr: bytes = b"") -> None:
        self.timeout = timeout
        self.stdout = stdout
        self.stderr = stderr
        super().__init__(f"the command was killed after {timeout:g} s", machine=machine)


class ExecFailed(GuestError):
    """`check=True` and the exit status is not 0. `result` is the whole ExecResult."""

    def __init__(self, machine: str, result: object, message: str) -> None:
        self.result = result
        super().__init__(message, machine=machine)


class GuestShort(GuestError):
    """The guest gave back less memory than it was asked for, in the time that it had: `given` bytes."""

    def __init__(self, message: str, given: int, *, machine: str = "", hint: str = "") -> None:
        self.given = given
        super().__init__(message, machine=machine, hint=hint)


class BuildFailed(GuestError):
    """The RUN at `line` of the Containerfile `file` failed: `exit_code` (None if it had no time to end), and the end of its `output`."""

    def __init__(self, file: str, line: int, message: str, *, exit_code: int | None = None, output: bytes = b"") -> None:
        self.file = file
        self.line = line
        self.exit_code = exit_code
        self.output = output
        last = output.decode(errors="replace").strip().splitlines()[-1:] or [""]
        super().__init__(f"{file}:{line}: RUN {message}{f': {last[0]}' if last[0] else ''}")


class FileError(GuestError, OSError):
    """A file operation in the machine failed, with the guest's `errno` and `filename`."""

    def __init__(self, code: int, path: str, *, machine: str = "") -> None:
        GuestError.__init__(self, f"{path}: {os.strerror(code)}", machine=machine)
        self.errno = code
        self.filename = path
        self.strerror = os.strerror(code)


class WaitTimeout(GuestError, TimeoutError):
    """The machine did not end in the time given."""


class BadArgument(GuestError):
    """An argument of a program's system call cannot be read or written: `errno` is what the kernel would have answered."""

    def __init__(self, code: int, message: str, *, machine: str = "") -> None:
        self.errno = code
        super().__init__(f"{message}: {os.strerror(code)}", machine=machine)


class BadAddress(GuestError, LookupError):
    """No memory lies at an address of the machine's, or none that may be used so."""


class CallGone(GuestError):
    """The program died, or was interrupted, while its system call was held: nobody waits for the answer."""


class GuestProtocolError(GuestError):
    """The guest sent what the protocol (guest/PROTOCOL.md) does not allow."""


class GuestGone(GuestError, ConnectionError):
    """The line to the machine closed: it stopped, was stopped, or its keeper died."""
