"""Policy: what the programs of a command, or of a machine, get from their system calls.

    policy = Policy()
    policy.fail("write", "ENOSPC", path="/data/*", after=5)     # a rule: plain data, holds without us
    policy.paths(write=["/work"])                               # held by the kernel (Landlock)

    @policy.on("openat", timeout=2)                             # a handler: Python, while this process lives
    def opened(call): ...

    vm.exec(["make"], policy=policy)

Rules are asked in their order, the first that matches decides, and handlers get what no rule decides. A rule that could never
be asked is an error that names both. `rule.enforces` says whether a program can get around a rule: what is decided by
a path that lies in the program's own memory is an observation, however it is answered, and so nothing here allows or denies by path but
`paths`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivisor.core.errors import InvalidSpec
from trivisor.core.rules import MAX_RULES, Condition, Paths, Rule, SyscallSpec, parse
from trivisor.launch import syscalls
from trivisor.vos.syscalls.table import signature

if TYPE_CHECKING:
    from trivisor.vos.syscalls.call import Call

HANDLER_TIMEOUT = 5.0
"""Seconds that a handler has to answer, unless it is given others; then the call fails with EPERM."""

Calls = str | int | Sequence[str | int]
"""System calls, each by name or by its number on this architecture."""
Places = str | Sequence[str]
Answering = Callable[["Call"], object]


@dataclass(frozen=True)
class Handler:
    """A Python function that answers calls."""

    calls: tuple[str, ...]
    function: Answering
    timeout: float
    enforces: bool = False
    """It may let no call be made whose memory it has looked at."""

    def __str__(self) -> str:
        return f"handler {getattr(self.function, '__name__', 'function')} of {'+'.join(self.calls)}"


@dataclass(frozen=True)
class Tracing:
    """Which calls are traced (none: all), whether clock reads become calls for it, and how many bytes of a buffer are copied."""

    calls: tuple[str, ...] = ()
    no_vdso: bool = False
    buffer: int = 64


class Policy:
    """Rules, handlers and paths. It may be used for any number of commands and machines, and is fixed for a command once that has begun.

    The methods that add a rule return it. They raise InvalidSpec: a name that is no call's (the hint has the nearest), a
    contradiction, a wish that could only pretend.

    Calls are given by name, which means the same on every architecture, or by this one's number.
    A rule's `args` are conditions on argument registers, by number or by the name that the man page has: {"fd": 1},
    {1: "&0x40 == 0x40"}, {"count": (">=", 4096)}; all must hold.
    `path` is a glob of the path, or of the path behind the file descriptor, that the call is given. Of the calls that match,
    `after` are left alone first, then every `every`-th is taken, at most `times`, each with `probability`, drawn from `seed`.
    """

    def __init__(self, *rules: Rule | str, paths: Paths | None = None) -> None:
        self._rules: list[Rule] = []
        self._handlers: list[Handler] = []
        self._paths = paths
        self._tracing: Tracing | None = None
        self._vdso = True
        for rule in rules:
            self.add(rule)

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(self._rules)

    @property
    def handlers(self) -> tuple[Handler, ...]:
        return tuple(self._handlers)

    @property
    def places(self) -> Paths | None:
        """What `paths` was told."""
        return self._paths

    @property
    def tracing(self) -> Tracing | None:
        return self._tracing

    @property
    def vdso(self) -> bool:
        """Whether programs keep the vDSO, which answers clock reads without a call."""
        return self._vdso and not (self._tracing and self._tracing.no_vdso)

    @property
    def spec(self) -> SyscallSpec:
        """What of it is plain data, which a machine's spec can hold: all but handlers."""
        return SyscallSpec(rules=self.rules, paths=self._paths)

    def copy(self) -> Policy:
        """Return another with the same in it."""
        made = Policy(paths=self._paths)
        made._rules, made._handlers = list(self._rules), list(self._handlers)
        made._tracing, made._vdso = self._tracing, self._vdso
        return made

    def joined(self, other: Policy) -> Policy:
        """Return a policy with what is in this one and then what is in `other`. Raises InvalidSpec for what contradicts each other."""
        agree([*self._rules, *other.rules], [*self._handlers, *other.handlers])
        if self._paths and other.places and self._paths != other.places:
            raise InvalidSpec(f"{self._paths} and {other.places} contradict each other", hint="say all places in one policy")
        made = Policy(paths=self._paths or other.places)
        made._rules = [*self._rules, *other.rules]
        made._handlers = [*self._handlers, *other.handlers]
        made._tracing = other.tracing or self._tracing
        made._vdso = self._vdso and other._vdso
        return made

    def answering(self) -> Policy | None:
        """Return a policy with only the handlers of this one; None if it has none."""
        made = Policy()
        made._handlers, made._vdso = list(self._handlers), self._vdso
        return made if made._handlers or not made._vdso else None

    # -- rules ------------------------------------------------------------------------------------

    def fail(self, calls: Calls, errno: str | int, **when: Any) -> Rule:
        """Have calls fail with `errno` (a name or number): args, path, after, every, times, probability, seed, delay (seconds)."""
        return self._make(calls, "errno", errno=errno, **when)

    def errno(self, calls: Calls, errno: str | int, *, args: object = None, delay: float | None = None) -> Rule:
        """Have calls that meet the conditions fail with `errno`, each of them."""
        return self._make(calls, "errno", errno=errno, args=args, delay=delay)

    def returns(self, calls: Calls, value: int, **when: Any) -> Rule:
        """Have calls return `value` without being made; conditions as of `fail`."""
        return self._make(calls, "return", value=value, **when)

    def delay(self, calls: Calls, seconds: float | str, **when: Any) -> Rule:
        """Have calls wait before they are made; conditions as of `fail`. Observation only: it changes nothing but time."""
        return self._make(calls, "delay", delay=seconds, **when)

    def tear(self, calls: Calls, keep: int, errno: str | int | None = "EIO", **when: Any) -> Rule:
        """Tear writes to regular files, as a disk does that fails: of what the call was given the first `keep` bytes are written, then it
        fails with `errno`; with None it says that all was written. Conditions as of `fail`."""
        return self._make(calls, "tear", value=keep, errno=errno, **when)

    def kill(self, calls: Calls, **when: Any) -> Rule:
        """Kill the process (SIGSYS) that makes the call; conditions as of `fail`."""
        return self._make(calls, "kill", **when)

    def log(self, calls: Calls, **when: Any) -> Rule:
        """Have calls noted and made; conditions as of `fail`. With conditions on arguments alone the kernel's log has them
        (SECCOMP_RET_LOG), else the machine's own, `Machine.logs(source="answer")`."""
        return self._make(calls, "log", **when)

    def allow(self, calls: Calls, *, args: object = None, path: str | None = None) -> Rule:
        """Have calls be made whatever the rules behind this one say. It never gives more than the wall does without a policy."""
        _no_path("allow", path)
        return self._make(calls, "allow", args=args)

    def deny(self, calls: Calls, *, args: object = None, path: str | None = None) -> Rule:
        """Have calls that meet the conditions fail with EPERM. Enforced by the kernel."""
        _no_path("deny", path)
        return self._make(calls, "errno", errno="EPERM", args=args)

    def add(self, rule: Rule | str) -> Rule:
        """Add a rule, or one that is written as `trivisor.core.rules.parse` reads it."""
        rule = parse(rule) if isinstance(rule, str) else rule
        if not isinstance(rule, Rule):
            raise InvalidSpec(f"{rule!r} is not a rule", hint='for example "write:ENOSPC,path=/data/*"')
        rule.check()
        for name in rule.calls:
            syscalls.number(name)
        if len(self._rules) >= MAX_RULES:
            raise InvalidSpec(f"a policy has at most {MAX_RULES} rules")
        agree([*self._rules, rule], self._handlers)
        self._rules.append(rule)
        return rule

    def _make(self, calls: Calls, action: str, *, args: object = None, **fields: Any) -> Rule:
        names = tuple(syscalls.name(call) for call in ((calls,) if isinstance(calls, str | int) else calls))
        if isinstance(args, Mapping):
            args = {_index(names, key): value for key, value in args.items()}
        return self.add(Rule.make(names, action, args=args, **fields))

    # -- the rest ---------------------------------------------------------------------------------

    def paths(self, *, read: Places | None = None, write: Places | None = None, execute: Places | None = None) -> Paths:
        """Let programs read, write (make, change, remove) and execute files only under these paths; None: as without.

        Enforced by the kernel (landlock(7)): also through links, renames and file descriptors opened later. The machine's
        /dev/null, zero, full, random, urandom and tty stay as they are.
        """
        made = Paths.make(read=read, write=write, execute=execute)
        if self._paths is not None and made != self._paths:
            raise InvalidSpec(f"{self._paths} and {made} contradict each other", hint="say all places in one call")
        self._paths = made
        return made

    def on(self, *calls: str | int, timeout: float = HANDLER_TIMEOUT, enforces: bool = False) -> Callable[[Answering], Answering]:
        """Have the function under it answer these calls, within `timeout` seconds. It is given a Call.

        If it raises, or is late, the call fails with EPERM. With `enforces` it cannot proceed with a call whose memory (a path, an
        address) it has looked at, since another thread may have changed it since: it answers by return, errno or on behalf.
        """
        if not calls or not all(isinstance(call, str | int) for call in calls):
            raise InvalidSpec("on takes system calls, by name or number", hint='for example @policy.on("openat", "openat2")')
        names = tuple(dict.fromkeys(syscalls.name(call) for call in calls))
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not math.isfinite(timeout) or timeout <= 0:
            raise InvalidSpec(f"timeout is seconds, more than 0, not {timeout!r}")

        def wrap(function: Answering) -> Answering:
            handler = Handler(names, function, float(timeout), enforces)
            agree(self._rules, [*self._handlers, handler])
            self._handlers.append(handler)
            return function

        return wrap

    def without_vdso(self) -> None:
        """Take the vDSO from programs: what they read of clocks, and of random numbers, become calls that rules and handlers see."""
        self._vdso = False

    def trace(self, *calls: str | int, no_vdso: bool = False, buffer: int = 64) -> None:
        """Have these calls (none: all) traced; with `no_vdso` clock reads become calls, that rules, handlers and traces see. At most
        `buffer` bytes are copied of what is read and written. The events go to whoever starts the command: Syscalls.trace."""
        names = tuple(dict.fromkeys(syscalls.name(call) for call in calls))
        self._tracing = Tracing(names, no_vdso, buffer)

    def __repr__(self) -> str:
        parts = [*map(str, self._rules), *map(str, self._handlers), *([str(self._paths)] if self._paths else [])]
        return f"Policy({'; '.join(parts)})"


def agree(rules: Sequence[Rule], handlers: Sequence[Handler]) -> None:
    """Raise InvalidSpec, naming both, if of two rules or handlers one can never be asked because of the other."""
    for at, later in enumerate(rules):
        for earlier in rules[:at]:
            if earlier.answer != later.answer and hides(earlier, later.calls, later.args, later.path):
                raise InvalidSpec(
                    f"{later} contradicts {earlier}, which comes first and takes all that it could",
                    hint="put the narrower one first, or leave one out",
                )
    for at, handler in enumerate(handlers):
        for rule in rules:
            if hides(rule, handler.calls, (), ""):
                raise InvalidSpec(f"{handler} contradicts {rule}, which leaves nothing for it", hint="leave one out, or narrow the rule")
        for other in handlers[:at]:
            if set(other.calls) & set(handler.calls):
                raise InvalidSpec(f"{handler} contradicts {other}", hint="a call has one handler")


def hides(earlier: Rule, calls: Iterable[str], args: Sequence[Condition], path: str) -> bool:
    """Whether `earlier` takes every one of some call's calls that meet these conditions."""
    if earlier.counts or not set(earlier.calls) & set(calls):
        return False
    if earlier.path and earlier.path not in (path, "*", "/*"):
        return False
    return all(any(_implies(known, wanted) for known in args) for wanted in earlier.args)


def _implies(known: Condition, wanted: Condition) -> bool:
    """Whether an argument that meets `known` always meets `wanted`."""
    if known == wanted:
        return True
    if known.index != wanted.index:
        return False
    if known.test == "==" and known.mask & wanted.mask == wanted.mask:
        return wanted.holds([known.value] * 6)
    if known.mask != wanted.mask or known.test == "!=":
        return False
    low, high = _range(known)
    if wanted.test == "!=":
        return not low <= wanted.value <= high
    least, most = _range(wanted)
    return least <= low and high <= most


def _range(condition: Condition) -> tuple[int, int]:
    value = condition.value
    return {
        "==": (value, value),
        "<": (0, value - 1),
        "<=": (0, value),
        ">": (value + 1, condition.mask),
        ">=": (value, condition.mask),
    }[condition.test]


def _index(calls: Sequence[str], key: object) -> object:
    """Return the number of the argument that all of `calls` call `key`; what is no text is left as it is."""
    if not isinstance(key, str):
        return key
    found: set[int] = set()
    for name in calls:
        syscalls.number(name)
        known = {argument.name: argument.index for argument in signature(name).arguments}
        if key not in known:
            raise InvalidSpec(f"{name} has no argument {key!r}", hint=f"it has {', '.join(known) or 'none'}")
        found.add(known[key])
    if len(found) > 1:
        raise InvalidSpec(f"{key} is not the same argument of all of {', '.join(calls)}", hint="give each call a rule of its own")
    return found.pop()


def _no_path(verb: str, path: str | None) -> None:
    if path is not None:
        raise InvalidSpec(
            f"{verb} by path would only pretend: the program may change the path after it was looked at",
            hint=f"paths(read=..., write=..., execute=...) is enforced by the kernel; fail(..., path={path!r}) injects a fault",
        )
