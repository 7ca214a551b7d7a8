"""Another time: a clock that is shifted, runs at another speed, or stands still.

The vDSO answers clock reads without a call, so it is taken from the programs (`no_vdso`): a wall where that cannot be done
refuses the policy. What the kernel itself stamps, such as the times of files, and how long a sleep takes, stay as they are.
"""

from __future__ import annotations

import time
from datetime import datetime

from trivisor.core.errors import InvalidSpec
from trivisor.vos.syscalls.call import Call
from trivisor.vos.syscalls.policy import Policy

_SECOND = 1_000_000_000
_REALTIME = {0, 5, 8, 11}
"""CLOCK_REALTIME, its coarse form, its alarm, and CLOCK_TAI (clock_gettime(2))."""
_MONOTONIC = {1, 4, 6, 7, 9}


def clock(policy: Policy, *, now: datetime | None = None, shift: float = 0.0, speed: float = 1.0, frozen: bool = False) -> None:
    """Have programs read a clock that says `now` when this is called (or is `shift` seconds off) and runs at `speed`; frozen: never moves.

    `now` must have a time zone. Monotonic clocks go on from where they are, at the same speed. Clocks of processor time are left alone.
    """
    if now is not None and (shift or now.tzinfo is None):
        raise InvalidSpec("now is a time with a time zone, and goes without shift", hint="for example now=datetime(2001, 1, 1, tzinfo=UTC)")
    if speed < 0:
        raise InvalidSpec(f"a clock that reads {speed} times as fast would go back")
    read = _Clock(round(now.timestamp() * _SECOND) if now else time.time_ns() + round(shift * _SECOND), 0.0 if frozen else speed)
    policy.without_vdso()

    @policy.on("clock_gettime")
    def clock_gettime(call: Call) -> None:
        which = call.arg("clockid")
        if which not in _REALTIME and which not in _MONOTONIC:
            call.proceed()
            return
        seconds, rest = divmod(read.realtime() if which in _REALTIME else read.monotonic(), _SECOND)
        call.write_struct("tp", {"tv_sec": seconds, "tv_nsec": rest})
        call.returns(0)

    @policy.on("gettimeofday")
    def gettimeofday(call: Call) -> None:
        seconds, rest = divmod(read.realtime(), _SECOND)
        call.write_struct("tv", {"tv_sec": seconds, "tv_usec": rest // 1000})
        call.returns(0)

    @policy.on("time")
    def seconds_alone(call: Call) -> None:
        seconds = read.realtime() // _SECOND
        if call.args[0]:
            call.write_at(call.args[0], seconds.to_bytes(8, "little", signed=True))
        call.returns(seconds)


class _Clock:
    def __init__(self, start: int, speed: float) -> None:
        self._start = start
        self._speed = speed
        self._begun = time.monotonic_ns()

    def _passed(self) -> int:
        return int((time.monotonic_ns() - self._begun) * self._speed)

    def realtime(self) -> int:
        """Nanoseconds since the epoch."""
        return self._start + self._passed()

    def monotonic(self) -> int:
        return self._begun + self._passed()
