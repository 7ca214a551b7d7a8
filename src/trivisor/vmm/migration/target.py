"""The machine that comes: looked at, made, filled, and let run when the source has given it up."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from trivisor.core import process
from trivisor.core.errors import AlreadyExists, InvalidSpec, MigrationError, NotFound, StorageError, UnsupportedByWall
from trivisor.core.process import Who
from trivisor.core.spec import Spec, checked
from trivisor.core.state import State
from trivisor.core.undo import Undo
from trivisor.images.catalog import Image
from trivisor.images.intake import Intake
from trivisor.images.limits import DEFAULT
from trivisor.images.model import Platform, is_digest
from trivisor.launch import keeper
from trivisor.launch.net import provide
from trivisor.vmm import budget, limits, locks, network, reconcile, removal
from trivisor.vmm.context import Context, pin_owner
from trivisor.vmm.engine import Progress
from trivisor.vmm.migration import pipes
from trivisor.vmm.migration.link import DISK, IMAGE, MEMORY, Link
from trivisor.vmm.migration.messages import VERSION, Go, Hello, Loaded, Ready, Running, Wants, failed
from trivisor.vmm.migration.mover import Mover
from trivisor.vmm.migration.transport import Access, Address, Listener
from trivisor.vmm.records import Row

_HELLO = 30.0
_GO = 60.0
_IMAGE = 1800.0
_STALL = 300.0
"""Seconds in which some of the machine must come."""
KERNELS = ("micro", "full")
"""Those that are no file of a host's."""
_IDLE: dict[str, Any] = {"operation": "", "operator": None}


def receive(
    context: Context,
    at: Address,
    access: Access,
    *,
    name: str | None,
    ports: dict[int, int] | None,
    timeout: float | None,
    listening: Callable[[str], object],
    progress: Progress,
) -> Row:
    """Wait for one machine, and return it running. Raises what VMM.receive raises; nothing is left here then."""
    with Listener(at, access) as listener:
        listening(str(listener.address))
        with listener.accept(timeout, progress) as link:
            try:
                row = _receive(context, link, name, ports, progress)
            except BaseException as error:
                # It is told only when nothing is left here: it lets the machine go on.
                with suppress(MigrationError):
                    link.send(failed(error))
                raise
            return row


def _receive(context: Context, link: Link, name: str | None, ports: dict[int, int] | None, progress: Progress) -> Row:
    hello = link.receive(Hello, _HELLO)
    if hello.version != VERSION:
        raise MigrationError(f"it speaks version {hello.version}, and this one {VERSION}", hint="use the same version of trivisor on both")
    spec = _spec(hello, name, ports)
    engine = context.engine(spec.wall, spec.name)
    if not isinstance(engine, Mover):
        raise UnsupportedByWall("receive machines that run", spec.wall, ["vm"])
    if context.records.row(hello.machine) is not None:
        raise AlreadyExists(f"the machine {hello.machine} is here already", machine=spec.name, hint="is it the same home?")
    if any(row.name == spec.name for row in context.records.rows()):
        raise AlreadyExists(f"there is a machine named {spec.name}", machine=spec.name, hint="receive it under another name")
    context.engine(spec.wall).check(spec)
    budget.possible(context, max(spec.memory, hello.hardware.memory))
    with Undo() as undo:
        image = _image(context, link, hello, undo, progress)
        row = Row(
            id=hello.machine,
            name=spec.name,
            slot=0,
            spec=spec,
            digest=image.digest,
            state=State.CREATED,
            operation="receive",
            operator=Who.me(),
            created=time.time(),
        )
        context.images.rootfs(row.digest, progress)
        engine.suits(context.box(row), hello.hardware)
        undo.add("row", lambda: context.records.remove(row))
        row = context.records.add(row)
        arrival = _Arrival(context, row, link, progress)
        done = _fill(context, row, engine, hello, arrival, undo, progress)
        undo.keep()
    network.started(context, done)
    # The machine is here, whether that can be said or not.
    with suppress(MigrationError):
        link.send(Running(seconds=time.monotonic() - arrival.began))
    return done


def _fill(context: Context, row: Row, engine: Mover, hello: Hello, arrival: _Arrival, undo: Undo, progress: Progress) -> Row:
    folder = context.folder(row)
    undo.add("folder", lambda: removal.remove_tree(folder.root))
    try:
        folder.root.mkdir(mode=0o700)
        folder.logs.mkdir(mode=0o700)
    except OSError as error:
        raise StorageError(f"{folder.root} cannot be made: {error.strerror}", machine=row.name) from error
    with locks.hold(folder.lock, "receive", row.name):
        budget.admit(context, row.id, max(row.spec.memory, hello.hardware.memory))
        limits.clear(context, row)
        undo.add("cgroup", lambda: limits.clear(context, row))
        undo.add("sockets", lambda: reconcile.clear_sockets(folder))
        undo.add("keeper", lambda: keeper.kill(folder))
        box = context.box(row)
        if hello.ttl is not None:
            box = replace(box, spec=msgspec.structs.replace(box.spec, ttl=hello.ttl))
        facts = engine.arrive(box, hello.hardware, arrival, undo, progress)
        provide.settle(row.spec)
        return context.records.update(row.id, durable=True, facts=facts, event=("received", "from another home"), **_IDLE) or row


class _Arrival:
    """What the link brings, as an engine takes it (mover.Arrival)."""

    def __init__(self, context: Context, row: Row, link: Link, progress: Progress) -> None:
        self._context, self._row, self._link, self._progress = context, row, link, progress
        self.began = time.monotonic()
        """When the machine ran on."""
        self._came = self.began, 0

    def disk(self, sock: socket.socket) -> None:
        self._link.open(DISK, sock)

    def memory(self, sock: socket.socket) -> None:
        self._link.open(MEMORY, sock)

    def ready(self) -> None:
        self._progress("receiving the machine")
        self._link.send(Ready())

    def look(self) -> None:
        self._link.look()
        now, came = time.monotonic(), self._link.received(MEMORY) + self._link.received(DISK)
        if came != self._came[1]:
            self._came = now, came
        if now - self._came[0] > _STALL:
            raise MigrationError(f"nothing of the machine came in {_STALL:g} s", hint="see what its source does")

    def over(self) -> bool:
        return self._link.ended(MEMORY)

    def loaded(self) -> None:
        self._link.send(Loaded())
        self._link.receive(Go, _GO)
        # From here on it is ours: who finds it so after our death lets it run.
        life: dict[str, Any] = {"state": State.RUNNING, "boot_id": process.boot_id(), "started": time.time()}
        self._context.records.update(self._row.id, durable=True, operation="arrive", **life)

    def gone_on(self) -> None:
        self.began = time.monotonic()


def _spec(hello: Hello, name: str | None, ports: dict[int, int] | None) -> Spec:
    """Return what the machine is asked to be, here. Raises InvalidSpec for what this host would have to take on trust."""
    wishes = {**hello.spec}
    if name is not None:
        wishes["name"] = name
    if ports is not None:
        wishes["ports"] = ports
    try:
        spec = checked(msgspec.convert(wishes, Spec, strict=False))
    except msgspec.ValidationError as error:
        raise InvalidSpec(f"what comes is no machine: {error}", hint="use the same version of trivisor on both hosts") from None
    if spec.volumes or spec.kernel not in KERNELS or spec.lifetime != "persistent" or spec.network == "host":
        raise InvalidSpec(
            "what comes wants this host's files, network or processes", machine=spec.name, hint="its owner changes that first"
        )
    if not all(1 <= port <= 65535 for pair in spec.ports.items() for port in pair):
        raise InvalidSpec("what comes publishes ports that there are not", machine=spec.name)
    return spec


def _image(context: Context, link: Link, hello: Hello, undo: Undo, progress: Progress) -> Image:
    """Return the machine's image, pinned for it; the source sends it if it is not here."""
    with suppress(NotFound):
        found = context.images.get(hello.digest)
        undo.add("image", lambda: context.images.unpin(pin_owner(hello.machine)))
        context.images.pin(found, pin_owner(hello.machine))
        link.send(Wants(False))
        return found
    ours, theirs = socket.socketpair()
    with ours:
        link.open(IMAGE, theirs)
        link.send(Wants(True))
        progress("receiving the image")
        with context.images.workspace() as work, Intake(context.images.store, work, DEFAULT, progress) as intake:
            archive = work.path / "image.tar"
            deadline = time.monotonic() + _IMAGE

            def look(_: int) -> None:
                link.look()
                if time.monotonic() > deadline:
                    raise MigrationError(f"the image did not come in {_IMAGE:g} s", hint="send it before, with save and load")

            pipes.read(ours, archive, look)
            for _, manifest, kind in intake.every(archive, Platform.host()):
                if f"sha256:{hashlib.sha256(manifest).hexdigest()}" == hello.digest:
                    image = context.images.add(manifest, kind, _free(context, hello), "another home", work)
                    undo.add("image", lambda: context.images.unpin(pin_owner(hello.machine)))
                    context.images.pin(image, pin_owner(hello.machine))
                    return image
    raise MigrationError("what came is not the machine's image", hint="send it before, with save and load")


def _free(context: Context, hello: Hello) -> str:
    """Return what the image is to be called: as there, unless something else is called so here; "" if it has no name there either."""
    if is_digest(hello.image):
        return ""
    try:
        context.images.get(hello.image)
    except NotFound:
        return hello.image
    return f"moved-{hello.machine}"
