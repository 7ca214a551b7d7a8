"""The gvisor wall: programs on the Sentry, a kernel in user space; runsc drives it, jailed, and a keeper runs runsc.

As on the container wall, what is kept of a machine while it is stopped is its writable layer, and its mounts end with its
namespaces. tvinit is PID 1 in the sandbox; it calls the machine's `door`, a unix socket that it sees as /.trivisor/door/line, and
calls again whenever that line ends, since the Sentry cannot carry a connection of the host's over a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from trivisor.core.errors import HostLacks, TrivisorError, UnsupportedByWall
from trivisor.core.paths import Home
from trivisor.core.spec import Spec, Wall
from trivisor.core.undo import Undo
from trivisor.launch import cgroup_layout, cgroups, ids, keeper, seccomp, tvinit
from trivisor.launch.cgroups import Cgroup, Limits
from trivisor.launch.container import Layer
from trivisor.launch.ids import Shape
from trivisor.launch.net import provide
from trivisor.launch.net.provide import Net
from trivisor.vmm import frozen_layers, layers, procs
from trivisor.vmm.engine import Box, Progress, Usage, WallReport
from trivisor.vmm.engines.gvisor import bundle, control, door, freeze, jailed, probe, runsc
from trivisor.vmm.engines.gvisor.jailed import Link, Sandbox
from trivisor.vmm.engines.gvisor.runsc import Runsc
from trivisor.vmm.freezer import Frozen
from trivisor.vos import guest
from trivisor.vos.line import Line
from trivisor.vos.ports import MemoryPort, SyscallPort

_WAIT = 60.0


class GvisorEngine:
    """Drives runsc for the machines of `home`. `path` is its path (default: $TRIVISOR_RUNSC, else the one in PATH);
    `platform` takes one of runsc's platforms instead of the best that works."""

    wall: Wall = "gvisor"

    def __init__(self, home: Home, path: str | None = None, *, platform: str | None = None) -> None:
        self._home = home
        self._path = path
        self._platform = platform

    def report(self) -> WallReport:
        details = {"limits": str(cgroup_layout.layout())}
        try:
            found, shape = self._found()
            details["runsc"] = f"{found.version} ({found.path})"
            details["ids"] = str(shape)
            verdict = probe.verdict(found, shape, self._home)
        except TrivisorError as error:
            return WallReport(wall=self.wall, available=False, why=str(error), remedy=error.hint, details=details)
        details["platform"] = verdict.platform + (f" ({verdict.why})" if verdict.why else "")
        details["jail"] = f"its own namespaces, seccomp; lacks {'; '.join((*jailed.LACKS, *shape.lacks))}"
        sized, details["disk"] = layers.disk_sizes()
        details |= provide.details()
        features = {"pause": True, "disk": True, "own_kernel": True, "host_image": True, "disk_size": sized, "nat": provide.nat()}
        return WallReport(wall=self.wall, available=True, features=features, details=details)

    def check(self, spec: Spec) -> None:
        self._found()
        cgroups.limits_possible(Limits.of(spec))
        if spec.dedupe:
            # What its programs have lies in a file of the Sentry's memory.
            raise UnsupportedByWall("have its pages merged with equal ones", self.wall, ("vm", "container"))
        layers.possible(spec)
        provide.check(spec)

    def create(self, box: Box, undo: Undo) -> None:
        layers.make(box, layers.shape(box).ids(box.slot).owner)

    def start(self, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
        return self._run(box, undo, None)

    def freeze(
        self, box: Box, into: Path, *, memory: bool, ends: bool = False, lasting: bool = True, quiesce: bool = False, progress: Progress
    ) -> Frozen:
        frozen_layers.possible(box)
        if not memory:
            return Frozen({}, freeze.layer(self, box, into, lasting=lasting))
        if jailed.rootless(layers.shape(box).ids(box.slot)):
            hint = "give the user subordinate ids (/etc/subuid, /etc/subgid), or freeze its files alone"
            raise HostLacks("runsc restores nothing where a machine has no ids beside root", machine=box.spec.name, hint=hint)
        found, paused, command = self._found()[0], self.paused(box), self._command(box)
        if paused:
            self.resume(box)  # its guest has to hang up
        with Undo() as undo:
            undo.add("pause", lambda: self.pause(box) if paused else None)
            go_on = partial(self._go_on, box, into)
            stood = freeze.whole(box, found, command, into, go_on, ends=ends, lasting=lasting)
            if not ends and not freeze.goes_on(found):
                began = time.monotonic()
                go_on()
                stood += time.monotonic() - began
            if paused and not ends:
                self.pause(box)
            undo.keep()
        return Frozen(freeze.needs(found, self._chosen(found, layers.shape(box)), command), stood, {"runsc": found.version})

    @property
    def ends_frozen(self) -> bool:
        """Whether a machine that is frozen ends, and is started from there: if we die meanwhile it stands still."""
        return not freeze.goes_on(self._found()[0])

    def fits(self, box: Box, needs: Mapping[str, str]) -> None:
        found = self._found()[0]
        freeze.fits(freeze.needs(found, self._chosen(found, layers.shape(box)), self._command(box)), needs, box.spec.name)

    def thaw(self, box: Box, frozen: Path, *, other: bool, undo: Undo, progress: Progress) -> dict[str, str]:
        # A machine that was ended by a freeze which was cut short has the layer that it needs: nothing ran since.
        if other or (frozen / frozen_layers.TAR).exists():
            self.refill(box, frozen, undo)
        facts = self._run(box, undo, frozen)
        if other:
            # What else tells it apart from the frozen one is its root's, which the host lays there, and its interface's.
            env = [("env", *(f"{key}={value}" for key, value in box.spec.env.items()))] if box.spec.env else []
            line = Line.connect(box.dir.line, box.spec.name)
            try:
                guest.configure(line, [("hostname", box.spec.name), *env, ("hooks",)])
            finally:
                line.close()
        return facts

    def refill(self, box: Box, frozen: Path, undo: Undo) -> None:
        frozen_layers.give(box, layers.shape(box), frozen, undo)

    def _go_on(self, box: Box, frozen: Path) -> None:
        with Undo() as undo:
            self._run(box, undo, frozen)
            undo.keep()

    def _run(self, box: Box, undo: Undo, frozen: Path | None) -> dict[str, str]:
        """Run the machine from its beginning, or on from what it was frozen in, until its guest answers."""
        found, shape = self._found()[0], layers.shape(box)
        layers.check(box, shape)
        platform = self._chosen(found, shape)
        begun = time.monotonic()
        with ExitStack() as stack:
            group = stack.enter_context(Cgroup.create(box.home, box.id, Limits.of(box.spec)))
            oom = stack.enter_context(group.ending(box.spec.oom == "stop"))
            said, log = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, said)
            stack.callback(os.close, log)
            net = stack.enter_context(provide.provide(box.home, box.dir, box.id, box.slot, box.spec, "veth", undo, log=log))
            undo.add("sandbox", lambda: keeper.kill(box.dir))
            listener = stack.enter_context(door.bind(box.dir, shape.ids(box.slot).owner))
            sandbox = _sandbox(box, found, platform, shape, group, net, log, stack.enter_context(layers.ready(box)), frozen)
            keeper.spawn(
                box.dir,
                processes=[*net.processes, keeper.Process("runsc", jailed.plan(sandbox))],
                line_fd=listener.fileno(),
                dialled=True,
                logs={"engine": said},
                fds=[log, *group.fds, *net.fds],
                owner=box.owner,
                ttl=box.spec.ttl,
                idle=box.spec.idle,
                wait=_WAIT,
                oom=oom,
            )
        took = f"{(time.monotonic() - begun) * 1000:.0f} ms"
        # Without a freezer runsc pauses it.
        lacks = [*shape.lacks, *(lack for lack in group.lacks if not lack.startswith("pause:"))]
        lacks += [jailed.HOSTS_STACK] if net.outward and jailed.rootless(shape.ids(box.slot)) else []
        facts = {"runsc": found.version, "platform": platform, "start": took, "ids": str(shape)}
        return {**facts, **net.facts, **({"lacks": "; ".join(lacks)} if lacks else {})}

    def pause(self, box: Box) -> None:
        if group := _freezer(box):
            group.freeze()
        else:
            control.pause(box, self._command(box))

    def resume(self, box: Box) -> None:
        if group := _freezer(box):
            group.thaw()
        else:
            control.resume(box, self._command(box))

    def paused(self, box: Box) -> bool:
        freeze.await_cut(box)
        group = _freezer(box)
        return group.frozen if group else control.paused(box, self._command(box))

    def usage(self, box: Box) -> Usage:
        """All of the sandbox's, the Sentry included."""
        return procs.usage(box)

    def syscalls(self, box: Box | None = None) -> SyscallPort:
        # The Sentry knows neither Landlock nor SECCOMP_RET_USER_NOTIF and _LOG.
        return SyscallPort(self.wall, frozenset({"kernel", "trace", "no-vdso"}), seccomp.OPEN)

    def memory(self, box: Box) -> MemoryPort:
        # What its programs have is scattered over the Sentry's own memory, and only the Sentry knows how.
        return MemoryPort(self.wall, frozenset())

    def sweep(self, home: Home, machines: set[str]) -> list[str]:
        return []

    def _command(self, box: Box) -> list[str]:
        """Return runsc's argv up to its verb, as the machine was started with it."""
        found, shape = self._found()[0], layers.shape(box)
        return jailed.command(found, self._chosen(found, shape), shape.ids(box.slot), network=box.spec.network != "none")

    def _chosen(self, found: Runsc, shape: Shape) -> str:
        """Return the platform that machines get."""
        return self._platform or probe.verdict(found, shape, self._home).platform

    def _found(self) -> tuple[Runsc, Shape]:
        return runsc.inspect(runsc.locate(self._path), self._home), ids.probe(self._home.root)


def _sandbox(
    box: Box, found: Runsc, platform: str, shape: Shape, group: Cgroup, net: Net, log: int, lies: Sequence[Layer], frozen: Path | None
) -> Sandbox:
    spec = box.spec
    shared = layers.volumes(spec)
    volumes = [bundle.Shared(bind.target, spec.volumes[bind.target].readonly) for bind in shared]
    return Sandbox(
        runsc=found,
        platform=platform,
        ids=shape.ids(box.slot),
        namespaces=shape.namespaces,
        config=bundle.config(hostname=spec.name, memory=spec.memory, env=spec.env, volumes=volumes, tmpfs=spec.tmpfs),
        tvinit=frozen / freeze.MEMORY / freeze.TVINIT if frozen else tvinit.path(),
        frozen=frozen / freeze.MEMORY if frozen else None,
        log=log,
        memory=spec.memory,
        door=door.folder(box.dir),
        layers=lies,
        machine_id=hashlib.sha256(f"machine {box.id}".encode()).hexdigest()[:32],
        dns=net.dns,
        volumes=shared,
        tmpfs=[*spec.tmpfs],
        cgroups=group.fds,
        link=None if net.netns_fd is None else Link(net.netns_fd, *net.steps[1][1:]),
        outward=net.outward,
        volatile=layers.volatile(spec),
    )


def _freezer(box: Box) -> Cgroup | None:
    group = Cgroup.find(box.home, box.id)
    return group if group is not None and group.can_freeze else None
