"""Whether a machine is well, by the check that its image brings (HEALTHCHECK).

Nothing checks by itself: there is no daemon. Whoever asks has the check run in the machine, as the image's user, and what it said is
kept in the machine's folder, for all who ask, until the machine's next start or launch. Status and counts are as Docker has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from trivisor.core.errors import ExecTimeout, GuestError, InvalidSpec, StorageError, WaitTimeout
from trivisor.vmm.context import Context
from trivisor.vmm.records import Row
from trivisor.vmm.runconfig import Health
from trivisor.vos.processes import Processes

KEPT = 5
"""Of the last checks."""
MAX_OUTPUT = 4096
LEAST = 0.1
"""Seconds between two checks at least, whatever the image says."""
_NAME = "health"
_FILE_MAX = 256 << 10


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One check. `at`: seconds since the epoch; `exit_code` None: it was killed after its time. `output`: the beginning of it."""

    at: float
    duration: float
    exit_code: int | None
    output: str

    @property
    def well(self) -> bool:
        return self.exit_code == 0


class HealthStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a machine is: "none" (its image brings no check), "starting", "healthy" or "unhealthy"."""

    status: str
    failing: int = 0
    """Checks in a row that failed."""
    since: float = 0.0
    """Its program's launch, or the machine's start: seconds since the epoch."""
    checks: tuple[Checked, ...] = ()
    """The last ones, the latest last."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    life: float | None
    """The start that it is of."""
    known: HealthStatus


def begin(context: Context, row: Row) -> None:
    """The machine's program was launched: what was known before is of another."""
    _write(context, row, HealthStatus(status="starting", since=time.time()))


def known(context: Context, row: Row, check: Health | None) -> HealthStatus:
    """Return what the last check said."""
    if check is None:
        return HealthStatus(status="none")
    path = _path(context, row)
    try:
        with path.open("rb") as file:
            kept = msgspec.json.decode(file.read(_FILE_MAX), type=_Kept)
        if kept.life == row.started:
            return kept.known
    except (FileNotFoundError, msgspec.MsgspecError):
        pass  # none was made yet, or the file is of another version
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", machine=row.name) from error
    return HealthStatus(status="starting", since=row.started or time.time())


def check(context: Context, row: Row, asked: Health | None, processes: Processes) -> HealthStatus:
    """Have the check run once, and return how the machine is then. Raises InvalidState, GuestError, StorageError."""
    before = known(context, row, asked)
    if asked is None:
        return before
    after = judge(asked, before, _run(asked, processes))
    _write(context, row, after)
    return after


def judge(asked: Health, before: HealthStatus, done: Checked) -> HealthStatus:
    """Return how a machine is after one more check."""
    checks = (*before.checks, done)[-KEPT:]
    if done.well:
        return HealthStatus(status="healthy", since=before.since, checks=checks)
    if before.status == "starting" and done.at - before.since < asked.start_period:
        return HealthStatus(status="starting", since=before.since, checks=checks)
    failing = before.failing + 1
    status = "unhealthy" if failing >= asked.retries else before.status
    return HealthStatus(status=status, failing=failing, since=before.since, checks=checks)


def wait(
    context: Context, row: Row, asked: Health | None, processes: Processes, ended: Callable[[], int | None], timeout: float | None
) -> HealthStatus:
    """Check until the machine is healthy. `ended` gives the exit code of a program that has ended.

    Raises GuestError if it is found unhealthy or the program has ended, WaitTimeout after `timeout` seconds, InvalidSpec without a check.
    """
    if asked is None:
        raise InvalidSpec("its image has no health check", machine=row.name, hint="HEALTHCHECK in a Containerfile gives it one")
    end = None if timeout is None else time.monotonic() + timeout
    while (now := check(context, row, asked, processes)).status != "healthy":
        said = now.checks[-1].output.strip()[:200]
        if now.status == "unhealthy":
            raise GuestError(f"it is unhealthy: {said or 'the check says nothing'}", machine=row.name, hint="`trivisor logs` may say why")
        if (code := ended()) is not None:
            raise GuestError(f"its program has ended with status {code}", machine=row.name, hint="`trivisor logs` shows what it wrote")
        early = time.time() - now.since < asked.start_period
        pause = max(LEAST, asked.start_interval if early else asked.interval)
        if end is not None and time.monotonic() + pause > end:
            raise WaitTimeout(f"it is still {now.status} after {timeout:g} s: {said}", machine=row.name)
        time.sleep(pause)  # the image says how often it wants to be asked
    return now


def _run(asked: Health, processes: Processes) -> Checked:
    at, began = time.time(), time.monotonic()
    output = bytearray()

    def hear(data: bytes) -> None:
        output.extend(data[: MAX_OUTPUT - len(output)])

    code: int | None
    try:
        code = processes.exec(asked.argv, timeout=asked.timeout, on_stdout=hear, on_stderr=hear, max_output=MAX_OUTPUT).exit_code
    except ExecTimeout:
        code = None
        hear(f"\nkilled after {asked.timeout:g} s".encode())
    return Checked(at=at, duration=time.monotonic() - began, exit_code=code, output=bytes(output).decode(errors="replace"))


def _path(context: Context, row: Row) -> Path:
    return context.folder(row).root / _NAME


def _write(context: Context, row: Row, state: HealthStatus) -> None:
    path = _path(context, row)
    aside = path.with_name(f"{_NAME}.new")
    try:
        aside.write_bytes(msgspec.json.encode(_Kept(life=row.started, known=state)))
        aside.rename(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", machine=row.name) from error
