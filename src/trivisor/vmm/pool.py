"""Machines that already run and are warm, kept ready by a thread: `take` hands one over at once, and another is made behind it.

Where the wall freezes memory one machine is started and warmed, and frozen; the others begin there (snapshots/template.py). Elsewhere,
and where it cannot be frozen, each is started and warmed by itself. All of them are this process's: they end with it, however it ends,
and so does what they began in. A machine that was taken is its taker's, whatever becomes of the pool.

What cannot be made is tried again, less soon each time; meanwhile whoever asks an empty pool is told why.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import msgspec

from trivisor.core.errors import (
    EngineError,
    HostError,
    HostLacks,
    InvalidSpec,
    NotFound,
    PoolClosed,
    PoolEmpty,
    TrivisorError,
    UnsupportedByWall,
)
from trivisor.launch import keeper
from trivisor.vmm import names
from trivisor.vmm.context import Context
from trivisor.vmm.engine import Engine
from trivisor.vmm.machine import Machine
from trivisor.vmm.snapshots import template, thawing, verbs
from trivisor.vmm.snapshots.model import Kept
from trivisor.vos.processes import Argv

Ports = dict[int, int] | Literal["exposed"] | None
MOST = 1000
_MAKERS = 2
_BACKOFF, _BACKOFF_MOST = 0.1, 30.0
_STALE = 1.0
"""Seconds after which an attempt that failed says nothing of the next."""
_LOOK = 5.0
"""Seconds between two looks whether those that wait still live."""
_BREATH = 0.02
"""Seconds for which a maker lets whoever took a machine go first."""
_JOIN = 120.0
_LET_GO = 0.5
"""Seconds that a maker has to see that its machine is gone."""
_WARM = 60.0
_NAME_TRIES = 8


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool did and has."""

    size: int
    """How many it keeps ready."""
    ready: int
    making: int
    taken: int
    failed: int
    """Attempts to make one that failed."""
    died: int
    """Machines that ended while they waited."""
    forked: bool
    """Whether they begin in one frozen warm machine."""
    why: str
    """Why not, in words; "" where they do."""
    error: str
    """What the last attempt failed for; "" if it did not."""


class Pool:
    """Machines that wait to be taken. Made by VMM.pool; thread-safe; only the process that made it can use it.

    Used as a context it closes at the end of the `with`.
    """

    def __init__(
        self,
        context: Context,
        make: Callable[[], Machine],
        *,
        cold: str,
        size: int,
        warmup: Argv | None,
        warmup_timeout: float,
        closed: Callable[[Pool], object],
    ) -> None:
        self._context = context
        self._make = make
        self._size = size
        self._warmup = warmup
        self._warmup_timeout = warmup_timeout
        self._closed = closed
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._ready: deque[Machine] = deque()
        self._making = self._taken = self._failed = self._died = 0
        self._error: TrivisorError | None = None
        self._backoff = 0.0
        self._again = self._tried_at = 0.0
        self._closing = False
        self._begun: set[Machine] = set()
        self._template: Kept | None = None
        self._templated = threading.Lock()
        self._why = cold
        self._tried = bool(cold)
        self._threads = [
            threading.Thread(target=self._keep, name=f"trivisor-pool-{number}", daemon=True) for number in range(min(_MAKERS, size))
        ]
        for thread in self._threads:
            thread.start()

    # -- for who takes ----------------------------------------------------------------------------

    def take(self, timeout: float = 60.0) -> Machine:
        """Return a machine that runs and is warm. It is the caller's: it ends with a `with` that it is used in, and with this process.

        From an empty pool it comes when one is made, within `timeout` seconds. Raises PoolEmpty, with what went wrong, if making one fails
        or takes longer; PoolClosed if the pool is closed, or is another process's.
        """
        self._mine()
        deadline = time.monotonic() + timeout
        while True:
            machine = self._next(deadline)
            if _lives(self._context, machine):
                return machine.ephemeral()
            self._discard(machine)

    def wait(self, timeout: float | None = None) -> None:
        """Return when the pool is full. Raises PoolEmpty and PoolClosed as `take` does."""
        self._mine()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            failed = self._failed
            while len(self._ready) < self._size:
                self._await(deadline, failed)

    def stats(self) -> PoolStats:
        """Return what it did and has."""
        self._mine()
        with self._changed:
            return PoolStats(
                size=self._size,
                ready=len(self._ready),
                making=self._making,
                taken=self._taken,
                failed=self._failed,
                died=self._died,
                forked=self._template is not None,
                why=self._why,
                error=str(self._error) if self._error is not None else "",
            )

    def __len__(self) -> int:
        """How many are ready."""
        return self.stats().ready

    def close(self) -> None:
        """Delete what was not taken, and what is being made. Again, or in another process, it does nothing.

        Raises StorageError if something cannot be removed: the next opening of the home does it.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            for machine in list(self._begun):  # whoever waits for one learns that it is gone
                _delete(machine)
            for thread in self._threads:
                thread.join(_LET_GO)
        with self._changed:
            left, kept = list(self._ready), self._template
            self._ready.clear()
            self._template = None
        failure: TrivisorError | None = None
        for machine in left:
            failure = _delete(machine) or failure
        if kept is not None:
            template.drop(self._context, kept)
        self._closed(self)
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pool of {self._size}>"

    # -- inside -----------------------------------------------------------------------------------

    def _mine(self) -> None:
        """Before the lock is touched: in a forked child nobody would ever let go of it."""
        if os.getpid() != self._pid:
            raise PoolClosed(
                "the pool is another process's", hint="a forked child makes its own: what waits in this one ends with its maker"
            )

    def _next(self, deadline: float) -> Machine:
        with self._changed:
            failed = self._failed
            while not self._ready:
                self._await(deadline, failed)
            self._open()
            self._taken += 1
            machine = self._ready.popleft()
            self._changed.notify_all()
            return machine

    def _await(self, deadline: float | None, failed: int) -> None:
        """Wait for a change, with the lock held. Raises PoolEmpty if one cannot be made or the time is up."""
        self._open()
        now = time.monotonic()
        if self._failed == failed and self._again > now and now - self._tried_at > _STALE:
            self._again = 0.0  # whoever waits for one has it tried again
            self._changed.notify_all()
        if self._error is not None and (self._failed > failed or self._again > now):
            pause = max(0.0, self._again - now)
            hint = f"it tries again in {pause:.1f} s" + (f"; {self._error.hint}" if self._error.hint else "")
            raise PoolEmpty(f"the pool has no machine, and none can be made: {self._error}", hint=hint) from self._error
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise PoolEmpty("the pool has no machine yet", hint="give it more time, or make it larger; pool.stats() says what it does")
        self._changed.wait(left)

    def _open(self) -> None:
        if self._closing:
            raise PoolClosed("the pool is closed", hint="make another one: vmm.pool(...)")

    def _keep(self) -> None:
        """What a maker does."""
        while self._wanted():
            try:
                machine = self._one()
            except TrivisorError as error:
                self._note(error)
            except Exception as error:  # a fault of ours: the pool's users are told, where a thread's end would tell nobody
                self._note(HostError(f"{type(error).__name__}: {error}"))
            else:
                self._add(machine)

    def _wanted(self) -> bool:
        """Wait until a machine is wanted, and count it as being made. False if the pool closes."""
        with self._changed:
            while not self._closing:
                pause = self._again - time.monotonic()
                if len(self._ready) + self._making < self._size and pause <= 0:
                    self._making += 1
                    return True
                if not self._changed.wait(min(_LOOK, max(pause, 0.0) or _LOOK)):
                    self._look()
            return False

    def _look(self) -> None:
        """Drop those that ended while they waited, with the lock held."""
        dead = [machine for machine in self._ready if not _lives(self._context, machine)]
        for machine in dead:
            self._ready.remove(machine)
            threading.Thread(target=self._discard, args=[machine], name="trivisor-pool-discard", daemon=True).start()

    def _one(self) -> Machine:
        time.sleep(_BREATH)
        kept = self._frozen()
        if kept is None:
            machine = self._make()
            self._run(machine, self._warm)
        else:
            machine = self._child(kept)
            # The first command after a clone is slow: what it needs is translated, and read, for the first time.
            self._run(machine, lambda made: made.exec(["true"], timeout=_WARM))
        return machine

    def _run(self, machine: Machine, warm: Callable[[Machine], object]) -> None:
        """Start a machine and warm it; nothing is left of it if that fails."""
        self._begun.add(machine)
        try:
            machine.start()
            warm(machine)
        except BaseException:
            _delete(machine)
            raise
        finally:
            self._begun.discard(machine)

    def _child(self, kept: Kept) -> Machine:
        for attempt in range(_NAME_TRIES):
            try:
                return Machine(self._context, template.child(self._context, kept, names.readable(attempt)))
            except TrivisorError:
                if attempt == _NAME_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _frozen(self) -> Kept | None:
        """Return what machines begin in, made with the first; None where there can be none."""
        with self._templated:
            if not self._tried:
                self._template = self._freeze()
                self._tried = True
            return self._template

    def _freeze(self) -> Kept | None:
        machine = self._make()
        try:
            self._run(machine, self._warm)
            return template.freeze(self._context, machine.id)
        except (UnsupportedByWall, HostLacks, EngineError) as error:
            # That it cannot be started will be said of the next one too.
            self._why = str(error)
            return None
        finally:
            _delete(machine)

    def _warm(self, machine: Machine) -> None:
        if self._warmup is None:
            machine.exec(["true"], timeout=_WARM)
        else:
            machine.exec(self._warmup, timeout=self._warmup_timeout, check=True)

    def _add(self, machine: Machine) -> None:
        with self._changed:
            self._making -= 1
            self._error, self._backoff, self._again = None, 0.0, 0.0
            self._ready.append(machine)
            self._changed.notify_all()

    def _note(self, error: TrivisorError) -> None:
        with self._changed:
            self._making -= 1
            self._failed += 1
            self._error = error
            self._backoff = min(_BACKOFF_MOST, self._backoff * 2 or _BACKOFF)
            self._tried_at = time.monotonic()
            self._again = self._tried_at + self._backoff
            self._changed.notify_all()

    def _discard(self, machine: Machine) -> None:
        """Delete one that ended."""
        with self._changed:
            self._died += 1
            self._changed.notify_all()
        if (error := _delete(machine)) is not None:
            with self._changed:
                self._error = error


def cold(engine: Engine, warmup: Argv | None, snapshot: str | None) -> str:
    """Return why each machine is to be started by itself, in words; "" where one is frozen for all."""
    if snapshot is not None:
        return f"they begin in {snapshot}"
    if not thawing.with_memory(engine):
        return f"the {engine.wall} wall freezes no memory"
    # A start of gVisor takes no longer than a restore.
    return "" if warmup is not None or engine.wall == "vm" else "nothing is warmed"


def check(size: int, lifetime: str | None) -> None:
    """Raise InvalidSpec for a pool that there cannot be."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST:
        raise InvalidSpec(f"a pool has 1 to {MOST} machines, not {size!r}")
    if lifetime not in (None, "process"):
        raise InvalidSpec("a pool's machines end with the process that has it", hint='leave out lifetime, or say "process"')


def elsewhere(ports: Ports) -> Ports:
    """Return free ports of the host for the machine's ports: each machine of a pool publishes its own."""
    return dict(verbs.free_ports(list(ports.values()))) if isinstance(ports, dict) else ports


def _delete(machine: Machine) -> TrivisorError | None:
    """Delete a machine in whatever state it is; return what went wrong."""
    try:
        machine.delete(force=True)
    except NotFound:
        return None
    except TrivisorError as error:
        return error
    return None


def _lives(context: Context, machine: Machine) -> bool:
    return keeper.alive(context.home.machine(machine.id))
