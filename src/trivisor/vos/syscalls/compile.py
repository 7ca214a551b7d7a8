"""Out of a machine's rules, a command's policy and what the wall can, the operations that go with its EXEC (guest/PROTOCOL.md).

Everything is decided here, on the host: tvinit installs what it is given. A rule that asks only for argument registers becomes a
verdict of the filter. One that counts, waits, looks at a path or returns a number becomes NOTIFY there and a `rule` for
the answerer; rules of the same call behind it go along, for when it does not match. Since CONTINUE takes no second look at any
filter, calls that the wall's profile refuses end in the profile's errno, never in CONTINUE.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trivisor.core.errors import InvalidSpec
from trivisor.core.rules import Condition, Paths, Rule, SyscallSpec
from trivisor.launch import syscalls
from trivisor.launch.seccomp import ALLOW, KILL, LOG, NOTIFY, TRACE, Arg, Profile, compile_policy, refuse
from trivisor.vos.ports import SyscallPort
from trivisor.vos.syscalls.policy import Policy, Tracing, agree
from trivisor.vos.syscalls.records import trace_words
from trivisor.vos.syscalls.table import signature

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
"""What programs expect to read and write wherever they may."""
_BEFORE = frozenset({"prctl"})
"""What tvinit itself calls between filter and execve, when no tracer is there yet (guest/src/trace.h)."""
_LOW = 0xFFFFFFFF
_INTS = frozenset({"int", "uint", "fd", "dirfd", "mode", "dev", "pid", "uid", "sig"})
_LONG = {
    ("fcntl", 2),
    *(("prctl", at) for at in range(1, 5)),
    *((name, at) for name in ("preadv", "pwritev", "preadv2", "pwritev2") for at in (3, 4)),
}
"""Arguments of these kinds that have 64 bits all the same."""
_SHORT = frozenset({"addrlen", "optlen"})

Operation = tuple[str, ...]
_Verdict = tuple[tuple[Arg, ...], int]


@dataclass(frozen=True)
class Compiled:
    """What goes with a command."""

    operations: tuple[Operation, ...]
    token: bytes = b""
    """Names its listener to the answerer; empty: nothing is answered outside of the kernel."""
    policy: Policy | None = None
    """The policy whose handlers attach to it, if any."""
    ruled: frozenset[int] = frozenset()
    """Numbers of calls with a handler of which rules are asked first."""
    refused: Mapping[int, int] = field(default_factory=dict)
    """Numbers of calls that may not be let proceed, to the errno that they get instead."""


def compile_exec(port: SyscallPort, spec: SyscallSpec | None, policy: Policy | None, machine: str = "") -> Compiled | None:
    """Return what goes with a command of the machine with that name; None if nothing does.

    The machine's rules come before the command's. Raises InvalidSpec for what contradicts each other, UnsupportedByWall.
    """
    ours = policy or Policy()
    rules = (*(spec.rules if spec else ()), *ours.rules)
    places = [paths for paths in (spec.paths if spec else None, ours.places) if paths]
    if not rules and not places and not ours.handlers and not ours.tracing and ours.vdso:
        return None
    if spec and spec.rules:
        agree(rules, ours.handlers)
    handled = frozenset(name for handler in ours.handlers for name in handler.calls)
    work = _work(port.profile, port.machine, port.wall, rules, handled, ours.tracing)
    for feature in _needed(rules, places, ours, work):
        port.need(feature, machine)
    operations = [("seccomp", work.filter), *_landlock(places), *work.tracing]
    if not ours.vdso:
        operations.append(("no-vdso",))
    if not work.answered:
        return Compiled(tuple(operations))
    token = secrets.token_bytes(16)
    operations += [("token", token.hex()), *work.answered]
    return Compiled(tuple(operations), token, ours if ours.handlers else None, work.ruled, work.refused)


def _needed(rules: Sequence[Rule], places: Sequence[Paths], policy: Policy, work: _Work) -> Iterator[str]:
    """Yield the features of a wall that this takes."""
    yield "kernel"
    if places:
        yield "landlock"
    if any(rule.action == "log" and by_kernel(rule) for rule in rules):
        yield "log"
    if policy.tracing:
        yield "trace"
    if not policy.vdso:
        yield "no-vdso"
    if work.answered:
        yield "notify"


def by_kernel(rule: Rule) -> bool:
    """Whether a filter alone can answer it."""
    if rule.counts or rule.path or rule.delay or rule.action == "delay":
        return False
    return rule.action != "tear" and (rule.action != "return" or rule.value == 0)


class _Work:
    """One command's rules by call. Immutable: commands with the same rules share it."""

    def __init__(
        self, profile: Profile, machine: str, wall: str, rules: tuple[Rule, ...], handled: frozenset[str], tracing: Tracing | None
    ) -> None:
        self._profile = profile
        self._machine = machine
        self._known = syscalls.table(machine)
        self._rules = rules
        self._handled = handled
        for rule in rules:
            for name in rule.calls:
                syscalls.number(name, machine)
            _within(rule, profile, wall)
        self._asked = {name for rule in rules if not by_kernel(rule) for name in rule.calls}
        """Calls that a rule needs an answer from outside for."""
        self._named = {name for rule in rules for name in rule.calls} | handled
        self.answered = tuple(self._answered())
        """The rules and handlers that the filter leaves to others, in order."""
        self.ruled = frozenset(self._numbers(self._asked & handled))
        refused = {name: profile.refusal(name) for name in handled if name in self._known}
        self.refused = {self._known[name]: code for name, code in refused.items() if code is not None}
        """Calls that get this far only to be answered: the profile lets none of them be made."""
        # What stops a call for the tracer is the filter, where that does nothing else with it: an errno or a notification goes before.
        traced = frozenset(tracing.calls if tracing else ())
        alone = bool(traced) and not traced & (self._named | _BEFORE) and all(profile.refusal(name) is None for name in traced)
        self._traced = traced if alone else frozenset()
        mode = "filter" if alone else "stops" if traced else "all"
        self.tracing = [trace_words(sorted(traced), mode, machine, buffer=tracing.buffer)] if tracing else []
        verdicts = {name: self._verdicts(name) for name in self._named | self._traced}
        self.filter = compile_policy(profile, verdicts, machine=machine).hex()

    def _numbers(self, names: Iterable[str]) -> list[int]:
        """Return the numbers of those calls that this architecture has."""
        return [self._known[name] for name in sorted(names) if name in self._known]

    def _answered(self) -> list[Operation]:
        done: list[Operation] = []
        begun: set[str] = set()
        for number, rule in enumerate(self._rules):
            begun |= set() if by_kernel(rule) else set(rule.calls)
            done += self._operations(number, rule, [name for name in rule.calls if name in begun])
        for name in sorted(self._asked - self._handled):
            refused = self._profile.refusal(name)
            done += [("rule", "0", str(nr), f"errno={refused}") for nr in self._numbers([name]) if refused]
        if handled := self._numbers(self._handled):
            done.append(("handler", ",".join(map(str, handled))))
        return done

    def _verdicts(self, name: str) -> list[_Verdict]:
        """Return what the filter does with one call, in order, before the profile is asked."""
        made: list[_Verdict] = []
        for rule in self._rules:
            if name not in rule.calls:
                continue
            args = tuple(_arg(name, condition) for condition in rule.args)
            if not by_kernel(rule):
                made += self._within_profile(name, args, NOTIFY)
            elif rule.action == "errno":
                made.append((args, refuse(rule.errno)))
            elif rule.action == "return":
                made.append((args, refuse(0)))
            elif rule.action == "kill":
                made.append((args, KILL))
            else:
                made += self._within_profile(name, args, LOG if rule.action == "log" else ALLOW)
        if name in self._handled:
            made += self._within_profile(name, (), NOTIFY)
        elif name in self._traced:
            made += self._within_profile(name, (), TRACE)
        return made

    def _within_profile(self, name: str, args: tuple[Arg, ...], verdict: int) -> list[_Verdict]:
        """Return a verdict that lets the call be made, given only where the profile lets it be made. (What the profile refuses whatever
        the arguments are may be answered, but not made: `answered` and `refused` see to that.)"""
        return [((*args, *held), verdict) for held in self._profile.conditions(name) or ((),)]

    def _operations(self, number: int, rule: Rule, names: list[str]) -> list[Operation]:
        """Return a rule as the answerer reads it: once for each place where its calls have their path, all with one number, one count."""
        groups: dict[tuple[str, int | None, tuple[str, ...]], list[str]] = {}
        for name in names:
            on = path_argument(name) if rule.path else ""
            if on is None:
                raise InvalidSpec(f"of {rule}: {name} is given no path", hint="leave out path=, or name calls such as openat and write")
            args = tuple(_word(name, condition) for condition in rule.args)
            groups.setdefault((on, self._profile.refusal(name), args), []).append(name)
        done: list[Operation] = []
        for (on, refused, args), group in groups.items():
            numbers = self._numbers(group)
            if numbers:
                words = [f"arg={arg}" for arg in args] + _keys(rule, on)
                done.append(("rule", str(number + 1), ",".join(map(str, numbers)), *_action(rule, refused), *words))
        return done


_work = functools.lru_cache(maxsize=64)(_Work)


def path_argument(name: str) -> str | None:
    """Return where a call has its path, as `rule` says it: the first argument that is one, or else a descriptor; None: it has neither."""
    for kind, letter in (("path", "p"), ("fd", "f")):
        for argument in signature(name).arguments:
            if argument.kind == kind:
                return f"{argument.index}{letter}"
    return None


def width(name: str, index: int) -> int:
    """Return how many bits of an argument the kernel looks at: 32 or 64."""
    for argument in signature(name).arguments:
        if argument.index == index:
            short = argument.kind.isupper() or argument.kind in _INTS or argument.name in _SHORT
            return 32 if short and argument.name != f"arg{index}" and (name, index) not in _LONG else 64
    return 64


def _within(rule: Rule, profile: Profile, wall: str) -> None:
    """Raise InvalidSpec for a rule that would have calls made which the wall refuses."""
    if rule.action in ("allow", "log"):
        for name in rule.calls:
            if profile.refusal(name) is not None:
                raise InvalidSpec(
                    f"{rule} contradicts the {wall} wall's profile, which refuses {name}", hint="a handler may answer it: Policy.on"
                )


def _action(rule: Rule, refused: int | None) -> list[str]:
    delay = [f"delay={round(rule.delay * 1e9)}"] if rule.delay else []
    if rule.action == "errno":
        return [f"errno={rule.errno}", *delay]
    if rule.action == "return":
        return [f"return={rule.value}", *delay]
    if rule.action == "tear":
        return [f"tear={rule.value}:{rule.errno}", *delay]
    if rule.action in ("kill", "log"):
        return [rule.action]
    return [f"errno={refused}" if refused is not None else "continue", *delay]


def _keys(rule: Rule, on: str | None) -> list[str]:
    words = [f"path={rule.path}", f"on={on}"] if rule.path else []
    words += [f"after={rule.after}"] if rule.after else []
    words += [f"every={rule.every}"] if rule.every != 1 else []
    words += [f"times={rule.times}"] if rule.times is not None else []
    words += [f"probability={round(rule.probability * (1 << 32))}", f"seed={rule.seed}"] if rule.probability != 1 else []
    return words


def _arg(name: str, condition: Condition) -> Arg:
    """Return the condition as the kernel must test it: of an int the upper half of its register means nothing, and is the program's."""
    mask = condition.mask & _LOW if width(name, condition.index) == 32 else condition.mask
    if condition.value & ~mask:
        raise InvalidSpec(f"{condition}: argument {condition.index} of {name} has 32 bits")
    return Arg(condition.index, condition.test, condition.value, mask)


def _word(name: str, condition: Condition) -> str:
    arg = _arg(name, condition)
    return f"{arg.index}:{arg.test}:{arg.value}:{arg.mask}"


def _landlock(places: list[Paths]) -> list[Operation]:
    """Return one set of operations for all of `places`: what each of them allows."""
    if not places:
        return []
    flags: dict[str, str] = {}
    for letter, kind in (("r", "read"), ("w", "write"), ("x", "execute")):
        allowed: tuple[str, ...] | None = None
        for paths in places:
            # Executing takes reading (execve(2) opens the file): where reads are bound and executing is not, so is executing.
            wished = getattr(paths, kind)
            allowed = _common(allowed, paths.read if wished is None and kind == "execute" else wished, places)
        known: Iterable[str] = ("/",) if allowed is None else (*allowed, *(_DEVICES if letter != "x" else ()))
        for place in known:
            if letter not in flags.get(place, ""):
                flags[place] = flags.get(place, "") + letter
    return [("landlock", place, letters) for place, letters in sorted(flags.items())] or [("landlock", "none")]


def _common(machine: tuple[str, ...] | None, command: tuple[str, ...] | None, both: Sequence[Paths]) -> tuple[str, ...] | None:
    """Return the machine's places that the command's words leave. The other way round words would not do: a place of the command's under
    one of the machine's may be a link that the machine's programs made, and lead out of it."""
    if command is None:
        return machine
    if machine is None or "/" in machine:
        return command
    for place in command:
        if place not in machine and any(_under(place, folder) for folder in machine):
            raise InvalidSpec(
                f"{both[-1]} contradicts the machine's {both[0]}: {place} lies in a place of the machine's, and could be a link out of it",
                hint="bind a kind of access in the machine or in its commands, or name the machine's own places again",
            )
    return tuple(place for place in machine if any(_under(place, folder) for folder in command))


def _under(path: str, folder: str) -> bool:
    return path == folder or folder == "/" or path.startswith(folder + os.sep)
