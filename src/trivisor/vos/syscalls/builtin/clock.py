"""Another time: a clock that is shifted, or stands still.

The vDSO answers clock reads without a call, so it is taken from the programs (`without_vdso`): a wall where that cannot be
done refuses the policy. Clocks that only measure how long something takes stay as they are, and so do sleeps; what the kernel
itself stamps or compares (times of files, timers that are set to a time of day) goes by the real time.
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


def clock(policy: Policy, *, now: datetime | None = None, shift: float = 0.0, frozen: bool = False) -> None:
    """Have programs read a time of day that is `now` when this is called, or `shift` seconds off; with `frozen` it never moves.

    `now` must have a time zone.
    """
    if now is not None and (shift or now.tzinfo is None):
        raise InvalidSpec("now is a time with a time zone, and goes without shift", hint="for example now=datetime(2001, 1, 1, tzinfo=UTC)")
    begun = time.time_ns()
    off = round(now.timestamp() * _SECOND) - begun if now else round(shift * _SECOND)
    policy.without_vdso()

    def read() -> tuple[int, int]:
        """Return the seconds since the epoch, and nanoseconds."""
        return divmod((begun if frozen else time.time_ns()) + off, _SECOND)

    @policy.on("clock_gettime")
    def clock_gettime(call: Call) -> None:
        if call.arg("clockid") not in _REALTIME:
            call.proceed()
            return
        seconds, rest = read()
        call.write_struct("tp", {"tv_sec": seconds, "tv_nsec": rest})
        call.returns(0)

    @policy.on("gettimeofday")
    def gettimeofday(call: Call) -> None:
        seconds, rest = read()
        call.write_struct("tv", {"tv_sec": seconds, "tv_usec": rest // 1000})
        call.returns(0)

    @policy.on("time")
    def seconds_alone(call: Call) -> None:
        seconds, _ = read()
        if call.args[0]:
            call.write_at(call.args[0], seconds.to_bytes(8, "little", signed=True))
        call.returns(seconds)
