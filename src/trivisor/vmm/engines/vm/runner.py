"""Running one QEMU: jailed, under its keeper, its memory and disks as told. Used for machines and for making ice alike.

What QEMU sees of the host is listed in `_binds`: its own program, libraries and firmware read-only, and the machine's files.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trivisor.core.errors import EngineError
from trivisor.core.paths import MachineDir
from trivisor.core.process import start_time
from trivisor.core.spec import Spec
from trivisor.launch import jail, keeper, tvinit
from trivisor.launch.ending import wait_for
from trivisor.launch.jail import Bind, JailReport
from trivisor.launch.net import passt
from trivisor.launch.net.provide import Net, bare
from trivisor.launch.plan import Op, Plan
from trivisor.vmm.engines.vm import argv, files, sharing
from trivisor.vmm.engines.vm.argv import Memory, More, Places, Shape
from trivisor.vmm.engines.vm.kit import Kit
from trivisor.vmm.engines.vm.qemu import Qemu
from trivisor.vmm.engines.vm.qmp import Qmp

BOOT_WAIT = 120.0
CLONE_WAIT = 60.0
_LAST = 5.0
_TALK = b'{"execute": "qmp_capabilities"}\n'
"""What a monitor must be told before it tells of events (fired.py reads them)."""


@dataclass(frozen=True)
class Setup:
    """What every QEMU of one machine shape is run with."""

    qemu: Qemu
    shape: Shape
    kit: Kit
    jail: JailReport
    net: Net | None = None
    """Of the machine that is started, where it has one; not of its ice."""
    cgroups: Sequence[int] = ()
    """Of the machine that is started, where it has limits: to be joined by QEMU; not by that of its ice."""


@dataclass(frozen=True)
class Ram:
    """Guest memory: the kind, its file (file, ice, copy) or descriptor (sealed), and what must be done before QEMU is given a state."""

    memory: Memory
    file: Path | None = None
    fd: int | None = None
    finish: Callable[[], None] | None = None


@dataclass(frozen=True)
class Work:
    """One run. Without `state` QEMU boots the kit's kernel; with it, it takes the frozen device state from there."""

    place: MachineDir
    slot: int
    name: str
    ram: Ram
    state: Path | None = None
    incoming: Callable[[], None] | None = None
    """Instead: gives a waiting QEMU its state from elsewhere and lets it run (migrating.py)."""
    more: More | None = None
    fill: Callable[[Qmp, int], None] | None = None
    """With `more`: gives a waiting QEMU, of that pid, what lies in that."""
    root: Path | None = None
    """The image's squashfs; without it both disks are dummies."""
    disk: Path | None = None
    ports: Mapping[int, int] = field(default_factory=dict)
    """Published by passt; those of a tap are `net`'s."""
    net: Net | None = None
    """With a tap: the machine's link. Without one the tap leads nowhere, as is right for ice."""
    cgroups: Sequence[int] = ()
    shared: Spec | None = None
    """Whose volumes are shared."""
    owner: int | None = None
    ttl: float | None = None
    idle: float | None = None

    @property
    def boots(self) -> bool:
        return self.state is None and self.incoming is None


def run(setup: Setup, work: Work) -> keeper.Kept:
    """Start keeper and QEMU and return when the guest has answered. Raises EngineError with the end of QEMU's output."""
    _await_last(work.place)
    with contextlib.ExitStack() as stack:
        places = _places(setup, work)
        _own(setup, work)
        fds: dict[int, int] = {}
        line = _pair(stack, fds, argv.LINE)
        serial = _pair(stack, fds, argv.SERIAL)
        events = _pair(stack, fds, argv.EVENTS)
        os.write(events, _TALK)
        listener = stack.enter_context(_listen(work.place.qmp))
        fds[listener.fileno()] = argv.QMP
        said, log = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, said)
        stack.callback(os.close, log)
        fds[log] = 2
        processes: list[keeper.Process] = []
        named = [*fds]
        helpers, ends = _link(stack, setup, work, fds, log)
        processes += helpers
        named += ends
        if work.ram.fd is not None:
            fds[work.ram.fd] = argv.RAM_FD
        given = sharing.give(stack, work.place, work.shared, setup.shape.shares, log) if work.shared else sharing.Given()
        fds |= dict(given.sockets)
        processes += given.processes
        named += given.fds
        command = argv.command(
            setup.qemu.path,
            setup.shape,
            work.ram.memory,
            boot=work.boots,
            hold=work.incoming is not None,
            blank=work.root is None,
            places=places,
            name=work.name,
            more=work.more,
        )
        processes.append(keeper.Process("qemu", _plan(setup, work, places, command, fds, given.binds)))

        def begin(engine: int) -> None:
            # From here on QEMU alone listens: if it dies, who connects is refused instead of waiting for a greeting.
            listener.close()
            _thaw(work, engine)

        kept = keeper.spawn(
            work.place,
            processes=processes,
            line_fd=line,
            logs={"serial": serial, "engine": said, "events": events},
            fds=sorted({*named, *fds, *work.cgroups}),
            owner=work.owner,
            ttl=work.ttl,
            idle=work.idle,
            wait=BOOT_WAIT if work.boots else CLONE_WAIT,
            begin=begin,
        )
    _note(work.place, kept.engine_pid)
    return kept


def _link(stack: contextlib.ExitStack, setup: Setup, work: Work, fds: dict[int, int], log: int) -> tuple[list[keeper.Process], list[int]]:
    """Give QEMU the end of its network; return the helpers at the other, and the descriptors that those have."""
    if setup.shape.tap:
        link = work.net or stack.enter_context(bare())
        assert link.tap_fd is not None
        fds[link.tap_fd] = argv.NET
        return [*link.processes], [*link.fds]
    if not setup.shape.network:
        return [], []
    end = _pair(stack, fds, argv.NET)
    return [keeper.Process("passt", passt.plan(passt.check(), work.ports, end, log))], [*fds, end]


def engine(place: MachineDir) -> int | None:
    """Return QEMU's pid, or None if it does not run any more."""
    try:
        pid, _, started = (place.root / "engine").read_text().strip().partition(" ")
        return int(pid) if start_time(int(pid)) == int(started) else None
    except (OSError, ValueError):
        return None


def _await_last(place: MachineDir) -> None:
    """Wait for the end of the last QEMU here, whose keeper was killed: it dies of that a moment later, and has the disk locked so long."""
    if (pid := engine(place)) is None:
        return
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if engine(place) == pid:
                wait_for([fd], time.monotonic() + _LAST)
        finally:
            os.close(fd)


def _note(place: MachineDir, pid: int) -> None:
    try:
        (place.root / "engine").write_text(f"{pid} {start_time(pid)}\n")
    except OSError as error:
        raise files.storage(error, "writing the machine's folder") from error


def _thaw(work: Work, engine: int) -> None:
    """Give a waiting QEMU its state and let it run. Called when it has been started."""
    if work.incoming is not None:
        work.incoming()
    if work.state is None:
        return
    if work.ram.finish is not None:
        work.ram.finish()
    with Qmp.connect(work.place.qmp, work.name) as qmp, work.state.open("rb") as state:
        if work.fill is not None:
            work.fill(qmp, engine)
        qmp.state_from(state.fileno())
        qmp.ask("cont")


def _places(setup: Setup, work: Work) -> Places:
    if setup.jail.namespaces:
        return Places()
    kernel, initramfs = _kernel(setup)
    return Places(
        root=str(work.root or ""), disk=str(work.disk or ""), ram=str(work.ram.file or ""), kernel=str(kernel), initramfs=str(initramfs)
    )


def _kernel(setup: Setup) -> tuple[Path, Path]:
    return setup.kit.kernel, setup.kit.initramfs(tvinit.path(), tvinit.digest())


def _binds(setup: Setup, work: Work, places: Places) -> Iterator[Bind]:
    yield Bind(Path(setup.qemu.path), setup.qemu.path, "ro,exec")
    for folder in (*map(Path, setup.qemu.libraries), *setup.qemu.modules()):
        yield Bind(folder, str(folder), "ro,exec")
    for data in setup.qemu.data:
        yield Bind(Path(data), data, "ro")
    if setup.shape.accel == "kvm":
        yield Bind(Path("/dev/kvm"), "/dev/kvm", "rw,dev")
    if work.boots:
        kernel, initramfs = _kernel(setup)
        yield Bind(kernel, places.kernel, "ro")
        yield Bind(initramfs, places.initramfs, "ro")
    if work.ram.file is not None:
        yield Bind(work.ram.file, places.ram, "ro" if work.ram.memory == "ice" else "rw")
    if work.root is not None:
        yield Bind(work.root, places.root, "ro")
    if work.disk is not None:
        yield Bind(work.disk, places.disk, "rw")


def _plan(setup: Setup, work: Work, places: Places, command: list[str], fds: Mapping[int, int], more: Sequence[Bind]) -> Plan:
    mount = work.place.root / "jail"
    mount.mkdir(mode=0o700, exist_ok=True)
    plan = jail.jail(
        command,
        binds=[*_binds(setup, work, places), *more],
        env={"PATH": "/usr/bin", "HOME": "/"},
        fds=fds,
        root=mount,
        slot=work.slot,
        network="none",
        groups=_groups(setup),
        report=setup.jail,
    )
    if work.cgroups:
        plan = (("cgroup", *(str(fd) for fd in work.cgroups)), *plan)
    nine = setup.shape.shares is not None and setup.shape.shares.kind == "9p"
    if work.ram.fd is None and not nine:
        return plan
    # The one name by which a descriptor can be opened again is in /proc, and so are extended attributes of what must not be a link; QEMU's
    # own pid namespace holds nothing else.
    proc: Op = ("mount", "proc", "proc", "/proc", "ro", "")
    return tuple(word for op in plan for word in ((proc, op) if op[0] == "pivot" else (op,)))


def _groups(setup: Setup) -> list[int]:
    return [os.stat("/dev/kvm").st_gid] if setup.shape.accel == "kvm" else []


def _own(setup: Setup, work: Work) -> None:
    """Give the files that QEMU writes to the id that it runs as."""
    owner = jail.own_id(work.slot, setup.jail)
    if owner is None:
        return
    try:
        if work.disk is not None:
            os.chown(work.disk, owner, owner)
        if work.ram.file is not None and work.ram.memory != "ice":
            os.chown(work.ram.file, owner, owner)
    except OSError as error:
        raise files.storage(error, "giving the machine its files") from error


def _pair(stack: contextlib.ExitStack, fds: dict[int, int], number: int) -> int:
    """Make a connected pair: QEMU gets one end as `number`; return the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.enter_context(ours)
    stack.enter_context(theirs)
    fds[theirs.fileno()] = number
    return ours.fileno()


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    """Bind and listen before QEMU is started, so that nobody has to poll for the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        path.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Through the folder's descriptor: a path may be longer than a socket's address.
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.chmod(path.name, 0o600, dir_fd=folder)
        except OSError as error:
            raise EngineError("the QMP socket cannot be made", output=str(error)) from error
        finally:
            os.close(folder)
        listener.listen(4)
        yield listener
