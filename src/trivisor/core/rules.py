"""Rules about system calls: plain data, kept with a machine's spec, the same behind every wall.

Rules are asked in their order, and the first that matches decides. A rule that looks only at argument registers is
answered by a seccomp filter in the kernel; one that counts, waits or looks at a path is answered by a process outside of
the program (vos/syscalls says which is which). What the names of calls are is not known here: launch/syscalls.py has the tables.
"""

from __future__ import annotations

import errno as errnos
import math
import posixpath
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import msgspec

from trivisor.core.errors import InvalidSpec
from trivisor.core.units import parse_duration

Test = Literal["==", "!=", "<", "<=", ">", ">="]
TESTS: tuple[Test, ...] = ("==", "!=", "<=", ">=", "<", ">")
Action = Literal["allow", "errno", "return", "delay", "kill", "log", "tear"]
WHOLE = 0xFFFFFFFFFFFFFFFF
MAX_RULES = 256
MAX_CALLS = 64
MAX_CONDITIONS = 12
MAX_PATH = 1024
MAX_PATHS = 64
MAX_ERRNO = 4095
MAX_KEEP = 65536
TORN = frozenset({"write", "pwrite64"})
"""Calls that can be torn."""
MAX_DELAY = 3600.0

_CALL = re.compile(r"[a-z_][a-z0-9_]{0,39}", re.ASCII)
_CONDITION = re.compile(r"(?:&\s*(?P<mask>\w+)\s*)?(?P<test>==|!=|<=|>=|<|>|=)?\s*(?P<value>-?\w+)", re.ASCII)


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """(argument & mask) `test` value, unsigned, for the argument at `index` (0 to 5)."""

    index: int
    test: Test
    value: int
    mask: int = WHOLE

    def holds(self, args: Sequence[int]) -> bool:
        left, right = args[self.index] & self.mask, self.value
        return {"==": left == right, "!=": left != right, "<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[
            self.test
        ]

    def __str__(self) -> str:
        mask = "" if self.mask == WHOLE else f"&{self.mask:#x}"
        return f"arg{self.index}{mask}{self.test}" + (f"{self.value:#x}" if mask or self.value > 4096 else f"{self.value}")


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one or more calls get. Made by `Rule.make`, which checks it."""

    calls: tuple[str, ...]
    action: Action
    errno: int = 0
    """With action errno, and tear (0: the call says that all was written)."""
    value: int = 0
    """With action return: what the call is said to return, without being made. With tear: how many bytes are written."""
    delay: float = 0.0
    """Seconds before the answer; alone (action delay) the call is then made as it is."""
    args: tuple[Condition, ...] = ()
    """All must hold."""
    path: str = ""
    """A glob (fnmatch(3), `*` matches `/` too) of the path, or of the path of the file descriptor, that the call is given."""
    after: int = 0
    """Leave the first so many matches alone."""
    every: int = 1
    """Of those that follow, take every so many-th, the first included."""
    times: int | None = None
    """Take at most so many."""
    probability: float = 1.0
    seed: int = 0
    """Of the draws for `probability`: the same seed, the same draws."""

    @classmethod
    def make(cls, calls: str | Sequence[str], action: str, *, args: object = None, **fields: Any) -> Self:
        """Return a checked rule from what a person wrote. Raises InvalidSpec, naming what is wrong."""
        given = {key: value for key, value in fields.items() if value is not None}
        names = (calls,) if isinstance(calls, str) else tuple(calls)
        if given.get("probability", 1.0) != 1.0:
            given.setdefault("seed", secrets.randbits(32))
        if "errno" in given:
            given["errno"] = errno_number(given["errno"])
        if "delay" in given and not isinstance(given["delay"], float):
            given["delay"] = parse_duration(given["delay"], "delay") if given["delay"] else 0.0
        if "path" in given:
            given["path"] = str(given["path"])
        try:
            rule = msgspec.convert({"calls": names, "action": action, "args": conditions(args), **given}, cls)
        except msgspec.ValidationError as error:
            raise InvalidSpec(f"not a rule about system calls: {error}") from None
        rule.check()
        return rule

    def check(self) -> None:
        """Raise InvalidSpec for what no rule can be, whatever the wall."""
        if not self.calls or len(self.calls) > MAX_CALLS or not all(_CALL.fullmatch(name) for name in self.calls):
            raise InvalidSpec(f"{self.calls!r} are not names of system calls", hint=f"1 to {MAX_CALLS} names such as openat")
        if self.action == "errno" and not 1 <= self.errno <= MAX_ERRNO:
            raise InvalidSpec(f"errno {self.errno} is not 1 to {MAX_ERRNO}", hint='for example "ENOSPC"; returns(0) is success')
        if self.action == "tear" and (not set(self.calls) <= TORN or not 0 <= self.value <= MAX_KEEP or not 0 <= self.errno <= MAX_ERRNO):
            raise InvalidSpec(f"{self} tears no write", hint=f"calls {', '.join(sorted(TORN))}, and at most {MAX_KEEP} bytes that are kept")
        if self.action == "return" and not -(1 << 63) <= self.value < 1 << 63:
            raise InvalidSpec(f"{self.value} is not what a call can return")
        if not math.isfinite(self.delay) or not 0 <= self.delay <= MAX_DELAY or (self.action == "delay" and not self.delay):
            raise InvalidSpec(f"a delay is seconds, more than 0 and at most {MAX_DELAY:g}, not {self.delay!r}")
        if self.delay and self.action in ("kill", "log"):
            raise InvalidSpec(f"a delay goes with errno, return and allow, not with {self.action}")
        if self.path and self.action == "allow":
            raise InvalidSpec(
                "allow by path would only pretend: the program may change the path after it was looked at",
                hint="paths (read, write, execute) are enforced by the kernel; a rule with an errno and a path injects a fault",
            )
        self._check_conditions()

    def _check_conditions(self) -> None:
        if len(self.args) > MAX_CONDITIONS:
            raise InvalidSpec(f"a rule has at most {MAX_CONDITIONS} conditions on arguments")
        for condition in self.args:
            if not 0 <= condition.index <= 5 or not 0 <= condition.value <= WHOLE or not 0 < condition.mask <= WHOLE:
                raise InvalidSpec(f"{condition} is not a condition on an argument", hint="arguments are 0 to 5, values unsigned 64 bits")
        if self.path and (len(self.path.encode()) > MAX_PATH or "\0" in self.path or self.path[0] not in "/*?["):
            raise InvalidSpec(f"path {self.path!r} is not a glob of absolute paths", hint='for example "/data/*" or "*.db"')
        if self.after < 0 or self.every < 1 or (self.times is not None and self.times < 1):
            raise InvalidSpec(f"of {self}: after is 0 or more, every and times 1 or more")
        if not 0 < self.probability <= 1 or not 0 <= self.seed <= WHOLE:
            raise InvalidSpec(f"of {self}: probability is above 0 and at most 1, seed 0 or more")

    @property
    def counts(self) -> bool:
        """Whether it does not take each call that it matches."""
        return bool(self.after or self.every != 1 or self.times is not None or self.probability != 1)

    @property
    def answer(self) -> tuple[str, int, float]:
        """What it answers: two rules with the same one never contradict each other."""
        if self.action == "tear":
            return self.action, self.value << 12 | self.errno, self.delay
        return self.action, self.errno if self.action == "errno" else self.value if self.action == "return" else 0, self.delay

    @property
    def enforces(self) -> bool:
        """Whether a program cannot get around it: it changes the outcome, by what the kernel itself looks at, of each call that it
        matches. A path is memory that another thread may change after it was looked at; what counts lets calls through."""
        return self.action in ("errno", "return", "kill") and not self.path and not self.counts

    def __str__(self) -> str:
        """The form that `parse` reads."""
        words = [self._verdict()]
        words += [str(condition) for condition in self.args]
        words += [f"errno={errnos.errorcode.get(self.errno, self.errno)}"] if self.action == "tear" and self.errno else []
        words += [f"path={self.path}"] if self.path else []
        words += [f"delay={self.delay:g}s"] if self.delay and self.action != "delay" else []
        words += [f"after={self.after}"] if self.after else []
        words += [f"every={self.every}"] if self.every != 1 else []
        words += [f"times={self.times}"] if self.times is not None else []
        words += [f"probability={self.probability:g}", f"seed={self.seed}"] if self.probability != 1 else []
        return f"{'+'.join(self.calls)}:{','.join(words)}"

    def _verdict(self) -> str:
        if self.action == "errno":
            return errnos.errorcode.get(self.errno, str(self.errno))
        if self.action in ("return", "tear"):
            return f"{self.action}={self.value}"
        return f"delay={self.delay:g}s" if self.action == "delay" else self.action


class Paths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The only places under which programs may read, write (make, change and remove), or execute files; None: as the machine has it.

    Held by the kernel (landlock(7)), so that no program gets around it.
    """

    read: tuple[str, ...] | None = None
    write: tuple[str, ...] | None = None
    execute: tuple[str, ...] | None = None

    @classmethod
    def make(cls, **places: Any) -> Self:
        """Return a checked Paths; each of read, write, execute is a path, a list of paths, or None. Raises InvalidSpec."""
        return cls(**{kind: None if value is None else _places(kind, value) for kind, value in places.items()})

    def __bool__(self) -> bool:
        return any(places is not None for places in (self.read, self.write, self.execute))

    def __str__(self) -> str:
        told = {"read": self.read, "write": self.write, "execute": self.execute}
        return f"paths({', '.join(f'{kind}={list(places)}' for kind, places in told.items() if places is not None)})"


class SyscallSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for every command of a machine, whoever starts it."""

    rules: tuple[Rule, ...] = ()
    paths: Paths | None = None

    def check(self) -> None:
        """Raise InvalidSpec for a rule that cannot be. Contradictions and names of calls are for vos/syscalls to find."""
        if len(self.rules) > MAX_RULES:
            raise InvalidSpec(f"a machine has at most {MAX_RULES} rules about system calls, not {len(self.rules)}")
        for rule in self.rules:
            rule.check()


def syscalls(wish: Any) -> SyscallSpec | None:
    """Return what is meant: a SyscallSpec, rules, texts that `parse` reads, or a Policy (by its `spec`). Raises InvalidSpec."""
    wish = getattr(wish, "spec", wish)
    if isinstance(wish, SyscallSpec):
        wish.check()
        return wish if wish.rules or wish.paths else None
    if isinstance(wish, str | Rule | Paths):
        wish = [wish]
    if isinstance(wish, Mapping):
        try:
            return syscalls(msgspec.convert(wish, SyscallSpec))
        except msgspec.ValidationError as error:
            raise InvalidSpec(f"syscalls: {error}") from None
    if not isinstance(wish, Sequence):
        raise InvalidSpec(f"syscalls is a policy or a list of rules, not {wish!r}", hint='for example ["write:ENOSPC,path=/data/*"]')
    rules = tuple(parse(one) if isinstance(one, str) else one for one in wish if not isinstance(one, Paths))
    if not all(isinstance(rule, Rule) for rule in rules):
        raise InvalidSpec("syscalls holds what is no rule", hint='for example "write:ENOSPC,path=/data/*"')
    places = [one for one in wish if isinstance(one, Paths)]
    if len(places) > 1:
        raise InvalidSpec(f"{places[0]} and {places[1]} contradict each other", hint="say all places at once")
    return syscalls(SyscallSpec(rules=rules, paths=places[0] if places else None))


def parse(text: str) -> Rule:
    """Return the rule in CALL[+CALL...]:WHAT[,KEY=VALUE...], such as "write:ENOSPC,path=/data/*,after=5".

    WHAT is an errno's name, return=N, delay=TIME, tear=BYTES, kill, log or allow; keys are path, after, every, times, probability, seed,
    delay, and of tear errno; conditions are such as arg0=1, arg2>=4096, arg1&0x40==0x40. Raises InvalidSpec.
    """
    names, colon, rest = text.partition(":")
    what, *words = rest.split(",")
    if not colon or not what:
        raise InvalidSpec(f"{text!r} is not a rule", hint='CALL:WHAT, for example "write:ENOSPC,path=/data/*,after=5"')
    fields: dict[str, Any] = {}
    verb, equals, value = what.strip().partition("=")
    if verb in ("kill", "log", "allow") and not equals:
        action = verb
    elif verb in ("return", "tear") and equals:
        action, fields["value"] = verb, number(value, text)
    elif verb == "delay" and equals:
        action, fields["delay"] = "delay", value
    else:
        action, fields["errno"] = "errno", what.strip()
    args: list[Condition] = []
    for word in words:
        if matched := re.fullmatch(r"\s*arg([0-5])\s*(.+)", word):
            args.append(condition(int(matched[1]), matched[2]))
            continue
        key, _, value = (part.strip() for part in word.partition("="))
        if key not in ("errno", "path", "after", "every", "times", "probability", "seed", "delay") or key in fields:
            raise InvalidSpec(
                f"of rule {text!r}: {word!r} is not understood", hint="path, after, every, times, probability, seed, delay, argN"
            )
        try:
            fields[key] = value if key in ("errno", "path", "delay") else float(value) if key == "probability" else int(value, 0)
        except ValueError:
            raise InvalidSpec(f"of rule {text!r}: {value!r} is not a number") from None
    return Rule.make(names.split("+"), action, args=args, **fields)


def conditions(wish: object) -> tuple[Condition, ...]:
    """Return conditions from {index: value}, {index: ">= 4096"}, {index: ("<", 3)}, or a list of Condition. Raises InvalidSpec."""
    if wish is None:
        return ()
    if isinstance(wish, Mapping):
        return tuple(condition(index, one) for index, value in wish.items() for one in (value if isinstance(value, list) else [value]))
    if isinstance(wish, Sequence) and not isinstance(wish, str) and all(isinstance(one, Condition) for one in wish):
        return tuple(wish)
    raise InvalidSpec(f"args must map numbers of arguments to conditions, not {wish!r}", hint='for example {0: 1, 2: ">= 4096"}')


def condition(index: object, wish: object) -> Condition:
    """Return one condition: a value, (test, value), (test, value, mask), or text such as "!= 2" and "&0x40 == 0x40".

    A negative value means its 32-bit form, as the kernel reads an int.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= 5:
        raise InvalidSpec(f"{index!r} is not an argument's number", hint="arguments are 0 to 5")
    test, value, mask = "==", wish, WHOLE
    if isinstance(wish, tuple) and 2 <= len(wish) <= 3:
        test, value, mask = wish[0], wish[1], wish[2] if len(wish) == 3 else WHOLE
    elif isinstance(wish, str):
        found = _CONDITION.fullmatch(wish.strip())
        if found is None:
            raise InvalidSpec(f"{wish!r} is not a condition on argument {index}", hint='for example 3, ">= 4096" or "&0x40 == 0x40"')
        test = "==" if found["test"] in (None, "=") else found["test"]
        value, mask = number(found["value"], wish), number(found["mask"], wish) if found["mask"] else WHOLE
    if not isinstance(value, int) or not isinstance(mask, int) or test not in TESTS:
        raise InvalidSpec(f"{wish!r} is not a condition on argument {index}", hint=f"a value, or one of {' '.join(TESTS)} and a value")
    if value < 0:
        value, mask = value & 0xFFFFFFFF, mask & 0xFFFFFFFF
    if value > WHOLE or not 0 < mask <= WHOLE or value & ~mask:
        raise InvalidSpec(f"no argument {index} can be {wish!r}: the value has bits outside of the mask, or over 64")
    return Condition(index, test, value, mask)


def number(text: str, whole: str) -> int:
    """Return a number written in any base of Python's."""
    try:
        return int(text, 0)
    except ValueError:
        raise InvalidSpec(f"of {whole!r}: {text!r} is not a number") from None


def errno_number(wish: object) -> int:
    """Return the number of an errno given by name or number. Raises InvalidSpec."""
    if isinstance(wish, str) and not wish.isdecimal():
        code = getattr(errnos, wish.upper(), None) if wish.upper() in errnos.errorcode.values() else None
        if code is None:
            raise InvalidSpec(f"there is no errno {wish!r}", hint="for example ENOSPC, EIO or EACCES (errno(3))")
        return int(code)
    if isinstance(wish, bool) or not isinstance(wish, int | str) or not 1 <= int(wish) <= MAX_ERRNO:
        raise InvalidSpec(f"{wish!r} is not an errno", hint="for example ENOSPC, EIO or EACCES (errno(3))")
    return int(wish)


def _places(kind: str, wish: object) -> tuple[str, ...]:
    if isinstance(wish, str):
        wish = [wish]
    if not isinstance(wish, Sequence) or len(wish) > MAX_PATHS:
        raise InvalidSpec(f"{kind} must be a list of at most {MAX_PATHS} paths, not {wish!r}")
    for place in wish:
        if (
            not isinstance(place, str)
            or not place.startswith("/")
            or "\0" in place
            or len(place.encode()) > MAX_PATH
            or ".." in place.split("/")
        ):
            raise InvalidSpec(f"{place!r} is not an absolute path without '..'", hint=f'for example {kind}=["/work"]')
        if any(letter in place for letter in "*?["):
            raise InvalidSpec(f"{place!r} holds a wildcard", hint="a place is a folder with all under it, or one file")
    return tuple(sorted({posixpath.normpath("/" + place.lstrip("/")) for place in wish}))
