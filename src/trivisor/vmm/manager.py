"""VMM: the machines of one home, as one process has it open.

Nothing runs in the background: every call looks at the records and at the world, puts the first right by
the second, and acts. So any number of processes of one user may have the same home open.
"""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from trivisor.core.errors import AlreadyExists, HostLacks, InvalidSpec, NotFound, UnsupportedByWall
from trivisor.core.events import Event
from trivisor.core.paths import Home, default_home
from trivisor.core.spec import HOST_IMAGE, WALLS, Spec, Wall
from trivisor.images.catalog import Images
from trivisor.images.disks.catalog import Catalog
from trivisor.vmm import life, limits, names, reconcile, runconfig, shares, shelf
from trivisor.vmm import pool as pools
from trivisor.vmm import sweep as sweeping
from trivisor.vmm.budget import MemoryBudget, possible
from trivisor.vmm.choice import choose
from trivisor.vmm.context import Context
from trivisor.vmm.dedupe import Dedupe
from trivisor.vmm.disks import Disks
from trivisor.vmm.engine import Engine, Progress, WallReport
from trivisor.vmm.engines.container.engine import ContainerEngine
from trivisor.vmm.engines.gvisor.engine import GvisorEngine
from trivisor.vmm.engines.vm.engine import VmEngine
from trivisor.vmm.keywords import Keywords, RunKeywords
from trivisor.vmm.machine import Machine
from trivisor.vmm.migration import target, transport
from trivisor.vmm.migration.transport import Access, Tls
from trivisor.vmm.pool import Pool
from trivisor.vmm.records import Records, Row
from trivisor.vmm.snapshots import begun, verbs
from trivisor.vmm.snapshots.service import Snapshots
from trivisor.vmm.volumes import Volumes
from trivisor.vos.processes import Argv
from trivisor.vos.syscalls.compile import compile_exec
from trivisor.vos.syscalls.policy import Policy

_EVENT_POLL = 0.1
_LOOK = 1.0
"""Seconds between two looks at what the kernel killed."""
_NAME_TRIES = 8


class VMM:
    """The virtual machine manager of the home at `home` (default: `$TRIVISOR_HOME`, else the XDG data folder).

    Opening it removes what a crash left. Thread-safe, and usable after a fork. `engines` replaces the
    walls' engines. `memory_budget` ("8G") is kept in the home, as `vmm.budget.set` does. Raises StorageError for a home that cannot be
    used.
    """

    def __init__(
        self, home: Path | str | None = None, *, memory_budget: int | str | None = None, engines: Iterable[Engine] | None = None
    ) -> None:
        place = Home(Path(home).absolute() if home is not None else default_home())
        place.open()
        chosen: list[Engine] = list(engines) if engines is not None else [VmEngine(place), GvisorEngine(place), ContainerEngine(place)]
        records = Records(place.database)
        self._context = Context(
            home=place,
            records=records,
            images=shelf.images(place, records),
            disks=Catalog(place),
            engines={engine.wall: engine for engine in chosen},
        )
        self._pools: set[Pool] = set()
        if memory_budget is not None:
            self.budget.set(memory_budget)
        sweeping.sweep(self._context)

    @property
    def home(self) -> Path:
        return self._context.home.root

    @property
    def images(self) -> Images:
        return self._context.images

    @property
    def disks(self) -> Disks:
        """The disks of the home, and what goes to other hypervisors and comes from them."""
        return Disks(self._context)

    @property
    def budget(self) -> MemoryBudget:
        """The memory that the machines of the home may have together."""
        return MemoryBudget(self._context)

    @property
    def dedupe(self) -> Dedupe:
        """Whether the host's kernel keeps equal pages of machines once."""
        return Dedupe(self._context)

    @property
    def volumes(self) -> Volumes:
        """The named volumes of the home."""
        return Volumes(self._context.home, self._context.records.rows)

    @property
    def snapshots(self) -> Snapshots:
        """The snapshots of the home's machines."""
        return Snapshots(self._context)

    def create(
        self, image: str = "", *, snapshot: str | None = None, name: str | None = None, wall: str = "auto", **keywords: Unpack[Keywords]
    ) -> Machine:
        """Make a machine from an image, without starting it. `keywords`: the fields of core.spec.Spec; `ports="exposed"` publishes the TCP
        ports that the image exposes on free ones of the host.

        Or from a `snapshot` ("web@ready"): its first start goes on where that stands, or, if that is without memory, begins with its files.
        It is then on that one's wall, and what it is asked to be can be changed in part (vmm/snapshots/begun.py).

        `syscalls` may be a Policy: its rules and paths are the machine's, its handlers answer the commands that this process starts.

        Raises InvalidSpec, NotFound (image, snapshot), AlreadyExists (name), UnsupportedByWall, HostLacks, OverBudget, StorageError,
        ImageError (its config cannot be followed).
        """
        if snapshot is None and not image:
            hint = 'create("debian"), or create(snapshot="web@ready")'
            raise InvalidSpec("a machine is made from an image or from a snapshot", hint=hint)
        if snapshot is not None:
            if image:
                raise InvalidSpec("a snapshot has its image", hint="give one of the two")
            return Machine(self._context, begun.create(self._context, snapshot, name, wall, {**keywords}))
        return self._create(image, name, wall, keywords)

    def _create(self, image: str, name: str | None, wall: str, keywords: Keywords) -> Machine:
        chosen = self._wall(wall)
        spec: dict[str, Any] = {**keywords}
        if spec.get("ports") == "exposed":
            spec["ports"] = dict(verbs.free_ports(runconfig.exposed(self._context.images.get(image))))
        wishes = Spec.make(image=image, name=names.readable() if name is None else name, wall=chosen, **spec)
        if image == HOST_IMAGE and chosen == "vm":
            raise UnsupportedByWall("run on the host's own root", chosen, [wall for wall in self._context.engines if wall != "vm"])
        found = self._context.images.get(image)
        runconfig.of(found.config, found.name)
        self._context.engine(chosen).check(wishes)
        possible(self._context, wishes.memory)
        handlers = self._handlers(wishes, spec.get("syscalls"))
        if wishes.volumes:
            spec["volumes"] = shares.settle(self._context.home, wishes.volumes)
        # What the image wants in the environment and as labels lies under what the caller wants.
        spec["env"] = {**found.config.env, **wishes.env}
        spec["labels"] = {**found.config.labels, **wishes.labels}
        for attempt in range(_NAME_TRIES):
            wishes = Spec.make(image=image, name=names.readable(attempt) if name is None else name, wall=chosen, **spec)
            try:
                machine = Machine(self._context, life.create(self._context, wishes, found))
                self._context.held(machine.id).policy = handlers
                return machine
            except AlreadyExists:
                if name is not None or attempt == _NAME_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def run(
        self, image: str = "", *, snapshot: str | None = None, progress: Progress | None = None, **keywords: Unpack[RunKeywords]
    ) -> Machine:
        """Make and start a machine, from an image or a snapshot. It ends with this process, and is deleted when the `with` that it is used
        in ends.

        Raises what create and start raise; nothing is left then.
        """
        given: RunKeywords = {"lifetime": "process", **keywords}
        machine = self.create(image, snapshot=snapshot, **given)
        try:
            machine.start(progress=progress)
        except BaseException:
            machine.delete(force=True)
            raise
        return machine.ephemeral()

    def pool(
        self,
        image: str = "",
        *,
        size: int = 8,
        snapshot: str | None = None,
        warmup: Argv | None = None,
        warmup_timeout: float = 600.0,
        wall: str = "auto",
        **keywords: Unpack[Keywords],
    ) -> Pool:
        """Keep `size` machines running, warmed by the command `warmup`, that `take` hands over at once; more are made behind.

        Of an image or a snapshot, with the keywords of `create`. They end with this process; `ports` are published on free ports of the
        host. Returns before they are there: `wait` returns when they are. Raises what create raises.
        """
        pools.check(size, keywords.get("lifetime"))

        def make() -> Machine:
            given: Keywords = {**keywords, "lifetime": "process"}
            if given.get("ports"):
                given["ports"] = pools.elsewhere(given["ports"])
            return self.create(image, snapshot=snapshot, wall=wall, **given)

        first = make()  # what cannot be made is said now
        cold = pools.cold(self._context.engine(first.wall), warmup, snapshot)
        first.delete()
        pool = Pool(self._context, make, cold=cold, size=size, warmup=warmup, warmup_timeout=warmup_timeout, closed=self._pools.discard)
        self._pools.add(pool)
        return pool

    def get(self, key: str) -> Machine:
        """Return the machine with that name or id, or whose id alone begins so. Raises NotFound."""
        rows = [row for found in self._context.records.find(key) if (row := reconcile.settle(self._context, found)) is not None]
        if len(rows) == 1:
            return Machine(self._context, rows[0])
        if rows:
            raise NotFound(f"{key!r} could be {', '.join(row.name for row in rows)}", machine=key, hint="give more of the id, or the name")
        raise NotFound(f"there is no machine {key!r}", machine=key, hint="`trivisor ps -a` lists those there are")

    def receive(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        plain: bool = False,
        name: str | None = None,
        ports: dict[int, int] | None = None,
        timeout: float | None = None,
        listening: Callable[[str], object] = lambda _: None,
        progress: Progress = lambda _: None,
    ) -> Machine:
        """Wait at `address` (host:port, or unix:/path) for one machine that is moved here (Machine.migrate), and return it running.

        Over TCP both sides show certificates (`tls`) or know a `token`; `plain` is neither. `listening` is told where it is waited, also
        for port 0. It keeps its id, and its name unless another is given; `ports` replaces those that it publishes. `timeout`: seconds to
        be called in. Raises InvalidSpec, MigrationError, AlreadyExists, HostLacks, OverBudget, StorageError, EngineError, GuestError:
        nothing is left here then, and the machine goes on where it was.
        """
        access = Access(tls, token, plain)
        at = transport.address(address, access)
        row = target.receive(self._context, at, access, name=name, ports=ports, timeout=timeout, listening=listening, progress=progress)
        return Machine(self._context, row)

    def list(self, *, labels: Mapping[str, str] | None = None) -> builtins.list[Machine]:
        """Return the machines in all states, the oldest first; with `labels` those that have them all."""
        wanted = (labels or {}).items()
        rows = [row for row in self._context.records.rows() if wanted <= row.spec.labels.items()]
        return [Machine(self._context, row) for row in self._settled(rows)]

    def walls(self) -> builtins.list[WallReport]:
        """Return what each wall offers on this host, and why not. Takes up to two seconds once a boot."""
        missing = "this version of Trivisor has no engine for it"
        engines = self._context.engines
        return [engines[wall].report() if wall in engines else WallReport(wall=wall, available=False, why=missing) for wall in WALLS]

    def events(self, since: int = 0, *, follow: bool = False, timeout: float | None = None) -> Iterator[Event]:
        """Return what happened after the event with the id `since`; with `follow` what happens, for `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        looked = 0.0
        while True:
            if time.monotonic() >= looked + _LOOK:
                limits.note_all(self._context)
                looked = time.monotonic()
            batch = self._context.records.events(since)
            yield from batch
            if batch:
                since = batch[-1].id
                continue
            if not follow or (deadline is not None and time.monotonic() >= deadline):
                return
            # SQLite tells nobody of a change.
            time.sleep(_EVENT_POLL)

    def sweep(self) -> builtins.list[str]:
        """Remove what crashes left and compare every live machine with its record; return what was done, in words."""
        return sweeping.sweep(self._context, deep=True)

    def close(self) -> None:
        """Let go of the home: pools close, commands that do not outlive it (spawn's `detach`) are killed, machines go on as they are."""
        for pool in list(self._pools):
            pool.close()
        self._context.close()
        self._context.images.close()
        self._context.disks.close()
        self._context.records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"VMM({os.fspath(self.home)!r})"

    def _handlers(self, wishes: Spec, policy: object) -> Policy | None:
        """Return what of a machine's policy is not in its spec. Raises what a command of it would raise."""
        held = policy.answering() if isinstance(policy, Policy) else None
        if wishes.syscalls or held:
            compile_exec(self._context.engine(wishes.wall).syscalls(), wishes.syscalls, held, wishes.name)
        return held

    def _settled(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            settled = reconcile.settle(self._context, row)
            if settled is not None:
                yield settled

    def _wall(self, wish: str) -> Wall:
        """Return the engine's wall that is meant; "auto" is decided in choice.py."""
        engines = self._context.engines
        for wall in WALLS:
            if wish == wall:
                if wall not in engines:
                    raise UnsupportedByWall("run machines in this version of Trivisor", wall, engines)
                return wall
        if wish != "auto":
            raise InvalidSpec(f"there is no wall {wish!r}", hint=f"it is one of auto, {', '.join(WALLS)}")
        able: tuple[Wall, ...] = tuple(wall for wall in ("vm", "gvisor") if wall in engines)
        if len(able) == 1:
            return able[0]  # the engine's own check says what it lacks, without a probe
        choice = choose([engines[wall].report() for wall in able])
        if choice.wall is None:
            raise HostLacks(f"no wall can be used here: {choice.why}", hint=choice.remedy)
        return choice.wall
