"""The machine that leaves: its disk and memory are sent while it runs, then it is given up, and it alone or the target's runs."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from trivisor.core.errors import EngineError, HostError, InvalidSpec, MigrationError, TrivisorError, UnsupportedByWall
from trivisor.core.state import State
from trivisor.vmm import life, plugged, reconcile
from trivisor.vmm.context import Context
from trivisor.vmm.migration import pipes, transport
from trivisor.vmm.migration.link import DISK, IMAGE, MEMORY, Link, Refused
from trivisor.vmm.migration.messages import VERSION, Failed, Go, Hardware, Hello, Loaded, Ready, Running, Wants, failed
from trivisor.vmm.migration.mover import Departure, Mover, Precopy
from trivisor.vmm.migration.target import KERNELS
from trivisor.vmm.migration.transport import Access
from trivisor.vmm.records import Row

_ANSWER = 60.0
_PREPARE = 900.0
"""Seconds for the target to load an image, make its root and start a QEMU."""
_STAND = 20.0
"""Seconds that the machine may stand still beyond what was asked for, if its host or the network is slow: then it goes on here."""
_RUN = 180.0
"""Seconds for the target to let it run and hear from its guest."""
_LOOK = 0.1
_STILL = "this QEMU, without KVM, loses track of what a guest writes meanwhile"
_SPEED = 400e6
"""Bytes a second as which memory is sent at best."""
_OVER = ("failed", "cancelled", "completed", "none")
_IDLE: dict[str, Any] = {"operation": "", "operator": None}


@dataclass(frozen=True)
class MigrationProgress:
    """How far a migration is. Bytes, bytes a second, seconds."""

    phase: str
    """connect, image, disk, memory, handover, done."""
    done: int = 0
    total: int = 0
    """Of the phase; of memory what is sent again counts again, and `remaining` says what is left."""
    remaining: int = 0
    rate: float = 0.0
    dirty: float = 0.0
    """How fast the machine changes its memory."""
    expected: float | None = None
    """How long it would stand still if it were given up now."""


class Migration:
    """One machine on its way to another home. Got from Machine.migrate; its thread ends with it."""

    def __init__(
        self,
        context: Context,
        machine: str,
        to: transport.Address,
        access: Access,
        *,
        downtime: float,
        timeout: float,
        rate: int | None,
        throttle: bool,
        report: Callable[[MigrationProgress], object],
    ) -> None:
        self._context, self._machine, self._to, self._access = context, machine, to, access
        self._limit, self._timeout, self._rate, self._throttle = downtime, timeout, rate, throttle
        self._report = report
        self._cancelled, self._over = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._name = machine
        self._began = time.monotonic()
        self._sent = (self._began, 0)
        self.progress = MigrationProgress("connect")
        """How far it is, now."""
        self.downtime: float | None = None
        """Seconds for which the machine stood still, as far as that is known here."""
        self.seconds = 0.0
        """How long all of it took."""
        self._thread = threading.Thread(target=self._run, name=f"migrating {machine}", daemon=True)

    def begin(self) -> Self:
        self._thread.start()
        return self

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._over.is_set()

    def cancel(self) -> None:
        """Have the machine stay, if it was not given up yet; `wait` then raises MigrationError."""
        self._cancelled.set()

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until the machine runs there. Raises what went wrong; MigrationError says where the machine is. Ctrl-C cancels it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._over.wait(_LOOK):
                if deadline is not None and time.monotonic() > deadline:
                    raise MigrationError(f"it goes on after {timeout:g} s", machine=self._name, hint="wait longer, or cancel it")
        except KeyboardInterrupt:
            self.cancel()
            self._over.wait()
            raise
        if self._failure is not None:
            raise self._failure
        return self

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with life.operation(self._context, self._machine, "migrate") as row:
                try:
                    self._move(row)
                except (TrivisorError, OSError) as error:
                    self._settle(row, error)
                    raise
            self._context.forget(self._machine)
            self._say(MigrationProgress("done", self.progress.done, self.progress.done))
        except BaseException as error:
            self._failure = error
        finally:
            self.seconds = time.monotonic() - self._began
            self._over.set()

    def _settle(self, row: Row, error: Exception) -> None:
        """Write down how it ended; what could not be taken back here stays the operation's, for whoever reads it next."""
        if isinstance(error, MigrationError) and error.where == "unknown":
            said: dict[str, Any] = {"state": State.PAUSED, "reason": reconcile.GIVEN_UP, "granted": 0, **_IDLE}
            self._context.records.update(row.id, durable=True, event=("paused", f"it was given up to {self._to}: {error}"), **said)
            return
        current = self._context.records.row(row.id)
        if current is not None and current.operation == "migrate":
            self._context.records.update(row.id, event=("stayed", f"it was not moved to {self._to}: {error}"), **_IDLE)

    def _move(self, row: Row) -> None:
        engine = self._context.engine(row.spec.wall, row.name)
        if not isinstance(engine, Mover):
            raise UnsupportedByWall("move machines to another host while they run", row.spec.wall, ["vm"], machine=row.name)
        _movable(self._context, row)
        self._name = row.name
        box = self._context.box(row)
        departure = engine.departure(box)
        if not departure.live() and self._limit < box.spec.memory / _SPEED:
            hint = f"give it a downtime of {max(2, math.ceil(2 * box.spec.memory / _SPEED))} s or more, or run it on QEMU 9 or later"
            raise InvalidSpec(f"it must stand still while its memory is sent: {_STILL}", machine=row.name, hint=hint)
        hello = self._hello(row, engine.leaving(box))
        with transport.connect(self._to, self._access) as link:
            try:
                link.send(hello)
                if link.receive(Wants, _ANSWER, self._look).image:
                    self._send_image(link, row)
                self._say(MigrationProgress("connect"))
                with ExitStack() as stack:
                    # The target's QEMU greets ours as soon as it waits.
                    disk = _channel(stack, link, DISK) if hello.hardware.disk is not None else None
                    ends = _Ends(_channel(stack, link, MEMORY), disk, hello.hardware.taken)
                    link.receive(Ready, _PREPARE, self._look)
                    self._hand_over(row, link, departure, ends)
            except TrivisorError as error:
                # It may be that the target waits for more.
                with suppress(MigrationError):
                    link.send(failed(error) if not isinstance(error, Refused) else Failed("refused"))
                raise

    def _hello(self, row: Row, hardware: Hardware) -> Hello:
        left = None if row.spec.ttl is None else max(1.0, row.spec.ttl - (time.time() - (row.started or time.time())))
        name = self._context.images.get(row.digest).name
        return Hello(
            version=VERSION,
            machine=row.id,
            spec=msgspec.to_builtins(row.spec),
            image=name,
            digest=row.digest,
            hardware=hardware,
            ttl=left,
        )

    def _send_image(self, link: Link, row: Row) -> None:
        image = self._context.images.get(row.digest)

        def look() -> None:
            self._look()
            link.look()
            self._say(self._rated("image", link.sent(IMAGE), image.size))

        with pipes.written(lambda out: self._context.images.save([row.digest], out), look) as (sock, wait):
            link.open(IMAGE, sock)
            wait()

    def _hand_over(self, row: Row, link: Link, departure: Departure, ends: _Ends) -> None:
        try:
            stood = self._send(link, departure, ends)
            link.receive(Loaded, self._limit + _STAND, self._look)
            self._look()
            self._context.records.update(row.id, durable=True, operation="handover")
            link.send(Go())
        except BaseException as error:
            self._stay(row, departure, error)
            if isinstance(error, EngineError):
                link.look()  # what broke the link is what broke the QEMU behind it
            raise
        try:
            running = link.receive(Running, _RUN)
        except Refused as error:
            self._stay(row, departure, error)
            raise
        except MigrationError as error:
            hint = f"see whether it runs at {self._to}: if so, delete it here with force; if it is not even listed there, resume it"
            text = f"it was given up, and nothing came back ({error.message}): it stands still here"
            raise MigrationError(text, where="unknown", machine=row.name, hint=hint) from error
        self.downtime = max(0.0, time.monotonic() - stood - running.seconds)
        current = self._context.records.update(row.id, durable=True, operation="delete", event=("migrated", f"to {self._to}"))
        reconcile.erase(self._context, current or row, "deleted", f"it runs at {self._to} now")

    def _send(self, link: Link, departure: Departure, ends: _Ends) -> float:
        """Send disk and memory; return when the machine was stopped."""
        deadline = time.monotonic() + self._timeout
        if ends.disk is not None:
            with ends.disk:
                departure.mirror(ends.disk.fileno())
            while True:
                copied, size, equal = departure.mirrored()
                self._say(self._rated("disk", copied, max(size, ends.taken)))  # of a small one too, which is sent before the first look
                if equal:
                    break
                self._check(link, deadline, f"its disk was not sent in {self._timeout:g} s")
                time.sleep(_LOOK)
        live = departure.live()
        began = time.monotonic()
        if not live:
            departure.halt()
            deadline = began + self._limit
        with ends.memory:
            departure.send(ends.memory.fileno(), downtime=self._limit, rate=self._rate, throttle=self._throttle)
        self._say(_memory(departure.looked()))
        while not (found := departure.sending()).ready:
            if found.status in _OVER:
                link.look()
                raise EngineError("QEMU stopped sending the machine's memory", output=found.why, machine=self._name)
            self._say(_memory(found))
            if not live:
                self._check(link, deadline, f"it stood still while its memory was sent, for {self._limit:g} s: {_STILL}")
                continue
            changes = f"in {self._timeout:g} s its memory was not sent: it changes {found.dirty / 1e6:.0f} MB of it a second, and "
            changes += f"{found.rate / 1e6:.0f} are sent"
            self._check(link, deadline, changes)
        stood = time.monotonic() if live else began
        self._say(MigrationProgress("handover", found.sent, found.total, found.remaining, found.rate, found.dirty, found.expected))
        departure.part(mirrored=ends.disk is not None)
        departure.finish(_STAND)
        return stood

    def _check(self, link: Link, deadline: float, why: str) -> None:
        self._look()
        link.look()
        if time.monotonic() > deadline:
            hint = "give it more time (timeout=), let it stand still for longer (downtime=), or end what writes so much"
            raise MigrationError(f"it could not be moved: {why}", machine=self._name, hint=hint)

    def _look(self) -> None:
        if self._cancelled.is_set():
            raise MigrationError("it was cancelled", machine=self._name, hint="the machine goes on as before")

    def _stay(self, row: Row, departure: Departure, error: BaseException) -> None:
        """Have the machine go on here."""
        try:
            departure.abandon()
            self._context.records.update(row.id, operation="migrate")
        except HostError as failure:
            error.add_note(f"and the machine could not be let go on: {failure}")

    def _rated(self, phase: str, done: int, total: int) -> MigrationProgress:
        now = time.monotonic()
        at, before = self._sent if self.progress.phase == phase else (now, done)
        if now - at > 1 or self.progress.phase != phase:
            self._sent = (now, done)
        rate = (done - before) / (now - at) if now - at > _LOOK / 2 else self.progress.rate
        return MigrationProgress(phase, done, max(done, total), max(0, total - done), rate)

    def _say(self, progress: MigrationProgress) -> None:
        self.progress = progress
        self._report(progress)


@dataclass(frozen=True)
class _Ends:
    """QEMU's ends of the channels, and what the disk takes."""

    memory: socket.socket
    disk: socket.socket | None
    taken: int


def _channel(stack: ExitStack, link: Link, number: int) -> socket.socket:
    ours, theirs = socket.socketpair()
    stack.enter_context(theirs)
    link.open(number, ours)
    return theirs


def _memory(found: Precopy) -> MigrationProgress:
    expected = found.expected if found.rounds > 1 else None
    return MigrationProgress("memory", found.sent, max(found.total, found.sent), found.remaining, found.rate, found.dirty, expected)


def _movable(context: Context, row: Row) -> None:
    """Raise InvalidSpec, with the reason, for a machine that cannot be another host's."""

    def refuse(why: str, hint: str) -> InvalidSpec:
        return InvalidSpec(f"it cannot be moved: {why}", machine=row.name, hint=hint)

    if row.spec.lifetime == "process":
        raise refuse("its life is that of the process that made it", "make it with create and start")
    if row.spec.volumes:
        raise refuse(f"its volume at {next(iter(row.spec.volumes))} is this host's", "move one without volumes")
    if row.spec.kernel not in KERNELS:
        raise refuse("its kernel is a file of this host", "make it with the kernel micro or full")
    for name in plugged.read(context.folder(row).root):
        raise refuse(f"its device {name} is this host's", "detach it, and attach it again there")
    if context.held(row.id).policy is not None or context.servers(row.id):
        raise refuse("this process answers its programs' calls, or a device of it", "detach what answers: it cannot do so from here")
