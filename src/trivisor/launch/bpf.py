"""seccomp filters, compiled here: no libseccomp needed, and one program holds all rules.

A profile says which calls pass, always or under conditions on their arguments, and what the rest gets; a policy puts verdicts of
its own before it, call by call. The program is a binary search over runs of numbers, so that a call costs about eight
instructions. Kernels since 5.11 try each number once when a filter is installed and remember those that pass whatever their
arguments are: a call that no rule names is never given a test on an argument, and so costs what it costs under the profile alone.
A foreign architecture kills the process; x32 numbers fail with ENOSYS.

BPF here: seccomp(2), "struct seccomp_data"; Documentation/networking/filter.rst. Pointers cannot be looked at.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from trivisor.core.errors import InvalidSpec
from trivisor.launch.syscalls import number, table

ALLOW, LOG, TRACE, NOTIFY, KILL = 0x7FFF0000, 0x7FFC0000, 0x7FF00000, 0x7FC00000, 0x80000000
"""What a call may get, as seccomp(2) returns it; an errno is `refuse(n)`."""
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS."""

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_ERRNO = 0x00050000
_LOAD, _JUMP, _JEQ, _JGT, _JGE, _AND, _RET = 0x20, 0x05, 0x15, 0x25, 0x35, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_LOW = 0xFFFFFFFF

_Instruction = tuple[int, int, int, int]  # code, jt, jf, k: struct sock_filter
_Code = list[_Instruction]


@dataclass(frozen=True)
class Arg:
    """A condition on argument `index` (0 to 5): (argument & mask) `test` (value & mask), unsigned. All 64 bits count."""

    index: int
    test: Literal["==", "!=", "<", "<=", ">", ">="]
    value: int
    mask: int = 0xFFFFFFFFFFFFFFFF


Rule = tuple[Arg, ...]
"""Passes if all its conditions hold."""

Allowed = Mapping[str, tuple[Rule, ...]]
"""A call's name to its rules, of which one must pass; no rules: it always passes."""

Verdicts = Mapping[str, Sequence[tuple[Rule, int]]]
"""A call's name to what it gets, in order: the first whose conditions all hold decides; none: the profile does."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What calls get that no rule decides. Two are the same only if they are one: what is compiled out of one is kept by it."""

    allowed: Allowed = field(default_factory=dict)
    errnos: Mapping[str, int] = field(default_factory=dict)
    """Calls that are refused with an errno of their own."""
    default: int | None = errno.EPERM
    """The errno of all others; None: they pass."""

    def refusal(self, name: str) -> int | None:
        """Return the errno that the call gets whatever its arguments are; None if it may pass."""
        if name in self.errnos:
            return self.errnos[name]
        return None if name in self.allowed else self.default

    def conditions(self, name: str) -> tuple[Rule, ...]:
        """Return the rules of which one must hold for the call to pass; none: it passes always, or never."""
        return self.allowed.get(name, ())


OPEN = Profile(default=None)
"""Lets everything pass: a wall that has a kernel of its own needs no filter."""


def always(names: str | Iterable[str]) -> dict[str, tuple[Rule, ...]]:
    """Return `names` (words, or a list) as calls that always pass."""
    return dict.fromkeys(names.split() if isinstance(names, str) else names, ())


def refuse(code: int) -> int:
    """Return the verdict that fails a call with that errno; 0: it is not made, and returns 0."""
    return _ERRNO | code


def compile(  # noqa: A001
    allowed: Allowed,
    *,
    errnos: Mapping[str, int] | None = None,
    default: int | None = errno.EPERM,
    machine: str = "",
) -> bytes:
    """Return a BPF program (struct sock_filter, little-endian) for the operation `seccomp`.

    `machine` is as os.uname() names it, "" this one; calls that only others have are passed over.
    `errnos` gives calls an errno of their own.
    Raises HostLacks for a machine that we have no numbers for, InvalidSpec for the name of no call.
    """
    return compile_policy(Profile(allowed, errnos or {}, default), {}, machine=machine)


def compile_policy(profile: Profile, verdicts: Verdicts, *, machine: str = "") -> bytes:
    """Return the one program of a command: `verdicts` before what `profile` says. As compile; and InvalidSpec if it grows too long."""
    machine = machine or os.uname().machine
    calls = table(machine)
    codes: dict[int, _Code] = {}
    for name in {**profile.allowed, **profile.errnos, **verdicts}:
        place = calls.get(name) if name in calls else number(name, machine)
        if place is not None:
            codes[place] = _call(profile, name, verdicts.get(name, ()))
    rest = [_ret(ALLOW if profile.default is None else refuse(profile.default))]
    edges = sorted({0} | {place + step for place in codes for step in (0, 1)})
    runs = [(edge, codes.get(edge, rest)) for edge in edges]
    runs = [runs[0]] + [right for left, right in pairwise(runs) if left[1] != right[1]]
    program: _Code = [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, _AUDIT[machine]), _ret(KILL), (_LOAD, 0, 0, _NR)]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, _X32), _ret(refuse(errno.ENOSYS))]
    program += _tree(runs)
    if len(program) > MAX_INSTRUCTIONS:
        raise InvalidSpec(
            f"these rules take {len(program)} instructions of a filter, and the kernel takes {MAX_INSTRUCTIONS}",
            hint="give fewer conditions",
        )
    return b"".join(struct.pack("<HBBI", *step) for step in program)


def _call(profile: Profile, name: str, verdicts: Sequence[tuple[Rule, int]]) -> _Code:
    """Code for one call: the policy's verdicts, then the profile's."""
    code: _Code = []
    for rule, verdict in verdicts:
        code += _rule(rule, verdict)
        if not rule:
            return code
    refused = profile.refusal(name)
    if refused is not None:
        return [*code, _ret(refuse(refused))]
    for rule in profile.conditions(name):
        code += _rule(rule, ALLOW)
    otherwise = ALLOW if profile.default is None or not profile.conditions(name) else refuse(profile.default)
    return [*code, _ret(otherwise)]


def _ret(value: int) -> _Instruction:
    return (_RET, 0, 0, value)


def _half(at: int, mask: int) -> _Code:
    """Code that loads that half of an argument."""
    return [(_LOAD, 0, 0, at), (_AND, 0, 0, mask)] if mask != _LOW else [(_LOAD, 0, 0, at)]


def _rule(rule: Rule, verdict: int) -> _Code:
    """Code that gives the verdict if all of `rule` holds, and else falls off its end."""
    tail: _Code = [_ret(verdict)]
    for arg in reversed(rule):
        tail = [*(_equal(arg, len(tail)) if arg.test in ("==", "!=") else _ordered(arg, len(tail))), *tail]
    return tail


def _equal(arg: Arg, skip: int) -> _Code:
    """Code that falls through if `arg` holds, and else jumps over `skip` instructions more. A half that the mask hides is not read."""
    halves = [(_ARGS + 8 * arg.index + 4, arg.mask >> 32, arg.value >> 32), (_ARGS + 8 * arg.index, arg.mask & _LOW, arg.value & _LOW)]
    halves = [half for half in halves if half[1]]
    code: _Code = []
    for at, mask, value in reversed(halves):
        if arg.test == "==":
            jump = (_JEQ, 0, len(code) + skip, value & mask)
        elif not code:
            jump = (_JEQ, skip, 0, value & mask)
        else:
            jump = (_JEQ, 0, len(code), value & mask)  # a half that differs is enough
        code = [*_half(at, mask), jump, *code]
    if not halves and arg.test == "!=":
        return [(_JUMP, 0, 0, skip)]
    return code


def _ordered(arg: Arg, skip: int) -> _Code:
    """The same for an order: the high halves decide, unless they are equal. "<" is not ">=", "<=" is not ">"."""
    negated = arg.test in ("<", "<=")
    true, false = (skip, 0) if negated else (0, skip)
    value = arg.value & arg.mask
    code = [*_half(_ARGS + 8 * arg.index, arg.mask & _LOW), (_JGE if arg.test in (">=", "<") else _JGT, true, false, value & _LOW)]
    low = len(code)
    if not arg.mask >> 32:
        return code
    high: _Code = [(_JGT, 1 + low + true, 0, value >> 32), (_JEQ, 0, low + false, value >> 32)]
    return [*_half(_ARGS + 8 * arg.index + 4, arg.mask >> 32), *high, *code]


def _tree(runs: list[tuple[int, _Code]]) -> _Code:
    """Binary search: `runs` are (first number, code), ascending; the accumulator holds the number."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    left, right = _tree(runs[:middle]), _tree(runs[middle:])
    if len(left) <= 255:
        return [(_JGE, len(left), 0, runs[middle][0]), *left, *right]
    return [(_JGE, 0, 1, runs[middle][0]), (_JUMP, 0, 0, len(left)), *left, *right]
