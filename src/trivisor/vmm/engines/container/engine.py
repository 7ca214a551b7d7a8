"""The container wall: programs on the host's own kernel, in namespaces, with nothing installed but tvinit.

What is kept of a machine while it is stopped is its writable layer, a folder of what its programs changed. A start
composes a plan (launch/container.py) and has a keeper carry it out. All mounts are in the machine's own mount
namespace and end with it, so there is nothing to take down and nothing that a crash could leave.
"""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from trivisor.core.errors import HostLacks, TrivisorError, UnsupportedByWall
from trivisor.core.paths import Home
from trivisor.core.spec import Spec, Wall
from trivisor.core.undo import Undo
from trivisor.launch import cgroup_layout, cgroups, container, ids, keeper
from trivisor.launch.cgroups import Cgroup, Limits
from trivisor.launch.container import Container, Layer
from trivisor.launch.ids import Shape
from trivisor.launch.net import provide
from trivisor.launch.net.provide import Net
from trivisor.vmm import layers, procs
from trivisor.vmm.engine import Box, Progress, Usage, WallReport
from trivisor.vmm.engines.container import freezing, host, memory
from trivisor.vmm.engines.container.hotplug import Hotplug
from trivisor.vmm.freezer import Frozen
from trivisor.vos.ports import MemoryPort, SyscallPort

_WAIT = 60.0


class ContainerEngine:
    """Runs the containers of `home`."""

    wall: Wall = "container"
    freezes_memory = False
    lies_over_frozen = True

    def __init__(self, home: Home) -> None:
        self._home = home

    def report(self) -> WallReport:
        details = {"limits": str(cgroup_layout.layout()), **host.confinement()}
        try:
            shape = ids.probe(self._home.root)
        except TrivisorError as error:
            return WallReport(wall=self.wall, available=False, why=str(error), remedy=error.hint, details=details)
        details |= {"ids": str(shape), "namespaces": ", ".join(shape.namespaces)}
        sized, details["disk"] = layers.disk_sizes()
        details |= provide.details()
        if shape.lacks:
            details["lacks"] = ", ".join(shape.lacks)
        freezer = cgroup_layout.layout().of("freezer") is not None
        features = {"pause": freezer, "disk": True, "own_kernel": False, "host_image": True, "disk_size": sized, "nat": provide.nat()}
        return WallReport(wall=self.wall, available=True, features=features, details=details)

    def check(self, spec: Spec) -> None:
        ids.probe(self._home.root)
        cgroups.limits_possible(Limits.of(spec))
        host.merging(spec)
        layers.possible(spec)
        provide.check(spec)

    def create(self, box: Box, undo: Undo) -> None:
        layers.make(box, layers.shape(box).ids(box.slot).owner)

    def start(self, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
        shape = layers.shape(box)
        layers.check(box, shape)
        begun = time.monotonic()
        with ExitStack() as stack:
            group = stack.enter_context(Cgroup.create(box.home, box.id, Limits.of(box.spec)))
            oom = stack.enter_context(group.ending(box.spec.oom == "stop"))
            said, log = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, said)
            stack.callback(os.close, log)
            net = stack.enter_context(provide.provide(box.home, box.dir, box.id, box.slot, box.spec, "veth", undo, log=log))
            undo.add("container", lambda: keeper.kill(box.dir))
            self._run(box, shape, group, net, said, log, oom)
        took = f"{(time.monotonic() - begun) * 1000:.0f} ms"
        lacks = [*shape.lacks, *group.lacks, *host.lacks()]
        return {"start": took, "ids": str(shape), **net.facts, **({"lacks": "; ".join(lacks)} if lacks else {})}

    def pause(self, box: Box) -> None:
        _group(box).freeze()

    def resume(self, box: Box) -> None:
        _group(box).thaw()

    def paused(self, box: Box) -> bool:
        return _group(box).frozen

    def usage(self, box: Box) -> Usage:
        return procs.usage(box)

    def syscalls(self, box: Box | None = None) -> SyscallPort:
        port = host.syscalls()
        return port if box is None else replace(port, answer=box.dir.answer)

    def memory(self, box: Box) -> MemoryPort:
        return memory.port(box)

    def hotplug(self, box: Box) -> Hotplug:
        return Hotplug(box)

    def freeze(
        self, box: Box, into: Path, *, memory: bool, ends: bool = False, lasting: bool = True, quiesce: bool = False, progress: Progress
    ) -> Frozen:
        # What its programs wrote is in its files for whoever reads them, at rest or not.
        return freezing.freeze(box, into, memory=memory, lasting=lasting)

    def fits(self, box: Box, needs: Mapping[str, str]) -> None:
        freezing.fits(box, needs)

    def thaw(self, box: Box, frozen: Path, *, other: bool, undo: Undo, progress: Progress) -> dict[str, str]:
        raise UnsupportedByWall("go on with a machine's memory", self.wall, ("vm", "gvisor"), machine=box.spec.name)

    def refill(self, box: Box, frozen: Path, undo: Undo) -> None:
        freezing.refill(box, frozen, undo)

    def sweep(self, home: Home, machines: set[str]) -> list[str]:
        return []

    def _run(self, box: Box, shape: Shape, group: Cgroup, net: Net, said: int, log: int, oom: int | None) -> None:
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            intake, answer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(intake)
            stack.enter_context(answer)
            found = stack.enter_context(layers.ready(box))
            plan = container.plan(_container(box, found, shape, group, net, theirs.fileno(), answer.fileno(), log))
            keeper.spawn(
                box.dir,
                processes=[*net.processes, keeper.Process("container", plan)],
                line_fd=ours.fileno(),
                logs={"engine": said},
                fds=[theirs.fileno(), answer.fileno(), log, *group.fds, *net.fds],
                owner=box.owner,
                ttl=box.spec.ttl,
                idle=box.spec.idle,
                wait=_WAIT,
                answer=intake.fileno(),
                oom=oom,
            )


def _container(box: Box, found: Sequence[Layer], shape: Shape, group: Cgroup, net: Net, line: int, answer: int, log: int) -> Container:
    spec = box.spec
    return Container(
        hostname=spec.name,
        machine_id=hashlib.sha256(f"machine {box.id}".encode()).hexdigest()[:32],
        ids=shape.ids(box.slot),
        layers=found,
        line=line,
        answer=answer,
        log=log,
        memory=spec.memory,
        namespaces=shape.namespaces,
        netns=net.netns_fd,
        outward=net.outward,
        host_network=spec.network == "host",
        cgroups=group.fds,
        hierarchies=group.hierarchies,
        binds=layers.volumes(spec),
        tmpfs=spec.tmpfs,
        env=spec.env,
        dns=net.dns,
        open_files=min(container.OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        apparmor=host.apparmor(),
        volatile=layers.volatile(spec),
        hide=host.hidden(),
        merge=spec.dedupe,
    )


def _group(box: Box) -> Cgroup:
    group = Cgroup.find(box.home, box.id)
    if group is None:
        raise HostLacks("it has no control group", machine=box.spec.name, hint="see `trivisor doctor`")
    return group
