"""Machine: one virtual computer, as a caller holds it.

It keeps nothing but what never changes: every question is answered from the records, put right first, so two
Machines of one machine, in one process or in many, agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from trivisor.core.errors import NotFound, WaitTimeout
from trivisor.core.spec import Spec, Wall
from trivisor.core.state import State, check
from trivisor.images.catalog import Image
from trivisor.images.disks.formats import Format
from trivisor.images.disks.headers import Header
from trivisor.images.pack import PackedLayer
from trivisor.vmm import commit, life, limits, logs, memory, modify, network, program, reconcile, watch
from trivisor.vmm.context import Context
from trivisor.vmm.devices import MachineDevices
from trivisor.vmm.disks import Disks
from trivisor.vmm.engine import Progress
from trivisor.vmm.migration.machine import Movable
from trivisor.vmm.modify import Plan
from trivisor.vmm.program import Programmed
from trivisor.vmm.records import Row
from trivisor.vmm.snapshots.machine import Freezable
from trivisor.vos import guest
from trivisor.vos.capture import Sink, Stdin
from trivisor.vos.devices.service import Devices
from trivisor.vos.files import Files
from trivisor.vos.forward import Forward, forward
from trivisor.vos.line import Line
from trivisor.vos.memory.service import Memory
from trivisor.vos.network.service import Network
from trivisor.vos.ports import SyscallPort
from trivisor.vos.process import Process
from trivisor.vos.processes import MAX_OUTPUT, Argv, ExecResult, Processes
from trivisor.vos.syscalls import direct, remote
from trivisor.vos.syscalls.compile import Compiled
from trivisor.vos.syscalls.listener import Listener
from trivisor.vos.syscalls.policy import Policy
from trivisor.vos.syscalls.service import Syscalls
from trivisor.vos.syscalls.supervisor import Attachment
from trivisor.vos.syscalls.trace import Trace


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine takes of the host, and what it says of itself. Bytes and seconds."""

    private: int
    """Memory of the host that only this machine has."""
    shared: int
    """Memory that it shares with others: the ice that it maps."""
    cpu_seconds: float
    guest: dict[str, float]
    """The guest's own figures (PROTOCOL.md, stats), to be believed as far as the guest is; empty while paused."""


class Machine(Freezable, Programmed, Movable):
    """One machine of a home. Got from VMM.create, run, get and list. Thread-safe, and usable after a fork."""

    def __init__(self, context: Context, row: Row) -> None:
        super().__init__(context, row)
        self._folder = context.folder(row)
        self._deleted_at_exit = False

    # -- what it is -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._first.name

    @property
    def wall(self) -> Wall:
        return self._first.spec.wall

    @property
    def spec(self) -> Spec:
        """What it is asked to be, now."""
        row = self._context.records.row(self.id)
        return row.spec if row is not None else self._first.spec

    @property
    def state(self) -> State:
        """Where it is in its life, now. Raises NotFound if it was deleted."""
        return self._row().state

    def info(self) -> dict[str, Any]:
        """Return all that is known of it, as JSON would hold it. Times are seconds since the epoch."""
        row = limits.note(self._context, self._row())
        known = msgspec.to_builtins(row)
        known["wall"] = row.spec.wall
        known["folder"] = str(self._folder.root)
        for who in ("operator", "owner"):
            known[who] = known[who] and known[who]["pid"]
        return {**known, "spec": msgspec.to_builtins(row.spec)}

    # -- its life ---------------------------------------------------------------------------------

    def start(self, *, progress: Progress | None = None) -> None:
        """Run it, and return when its guest answers. `progress` is told what takes time.

        Raises InvalidState, Busy, HostLacks, OverBudget, EngineError (with the end of the engine's output), StorageError.
        """
        network.started(self._context, life.start(self._context, self.id, progress or (lambda _: None)))
        self.devices.settle()
        program.furnish(self._context, self._first, self.files)

    def pause(self) -> None:
        """Freeze it: when this returns no guest instruction runs. Raises InvalidState, Busy, EngineError."""
        life.pause(self._context, self.id)

    def resume(self) -> None:
        """Let it go on, from a pause or from a suspend. Raises InvalidState, Busy, OverBudget, EngineError; of a suspended one what start
        raises."""
        if self.state is State.SUSPENDED:
            network.started(self._context, life.start(self._context, self.id, lambda _: None, "resume"))
            return
        life.resume(self._context, self.id)

    def stop(self, timeout: float = 10.0) -> None:
        """Have its guest power off in order; after `timeout` seconds, or at once with 0, it is switched off.

        Raises InvalidState, Busy, EngineError.
        """
        try:
            life.stop(self._context, self.id, timeout)
        finally:
            self._context.lines.drop(self.id)

    def delete(self, *, force: bool = False) -> None:
        """Remove it with its disk. With `force` in any state, whatever it is doing. Raises InvalidState, Busy, StorageError."""
        try:
            life.delete(self._context, self.id, force=force)
            self._context.forget(self.id)
        finally:
            self._context.lines.drop(self.id)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until it neither runs nor is paused, and return the exit status that its guest gave, if it did.

        Raises WaitTimeout after `timeout` seconds, NotFound if it is deleted meanwhile.
        """
        while (row := self._row()).state in reconcile.LIVE:
            if not watch.wait_ended(self._folder, timeout):
                raise WaitTimeout(f"it is still {row.state} after {timeout:g} s", machine=self.name, hint="stop it, or wait longer")
        return row.status

    def modify(
        self,
        *,
        cpus: int | float | None = None,
        memory: int | str | None = None,
        disk: int | str | None = None,
        dry_run: bool = False,
        timeout: float = 10.0,
    ) -> Plan:
        """Give it other processors and memory, a larger disk: now where it can have them, else from its next start on. The plan says so.

        With `dry_run` nothing is changed. The guest of a virtual machine has `timeout` seconds to take part in each. Raises InvalidSpec,
        InvalidState for a virtual machine that is paused, GuestError, GuestShort (vos.memory.service.Memory.limit), HostLacks, OverBudget.
        """
        return modify.modify(
            self._context, self.id, lambda: self.files, cpus=cpus, memory=memory, disk=disk, dry_run=dry_run, timeout=timeout
        )

    def commit(self, name: str, *, config: Mapping[str, Any] | None = None, author: str = "", message: str = "") -> Image:
        """Make the image `name` of its image and what it wrote: one more layer. While it runs it stands still for that.

        `config` changes how the image wants to be run: `env`, `labels` (dicts, over what there is), `entrypoint`, `cmd` (lists), `user`,
        `working_dir`, `exposed_ports`, `volumes`, `stop_signal`. What lies in volumes is not in it. Raises InvalidSpec, InvalidState, Busy,
        ImageError, EngineError, StorageError, HostLacks.
        """
        return commit.commit(self._context, self.id, name, config=config or {}, author=author, message=message)

    def layer(self, target: str | os.PathLike[str], *, without: Sequence[str] = (), latest: int | None = None) -> PackedLayer:
        """Write what it changed of its image's root to the new file `target`, as an OCI layer (tar, gzip). It stands still for that.

        `without` are paths that are left out; no file in it is newer than `latest` (seconds since the epoch). Raises what `commit` raises.
        """
        return commit.layer(self._context, self.id, Path(target), without=without, latest=latest)

    def export_disk(
        self,
        path: str | os.PathLike[str],
        format: Format | None = None,  # noqa: A002 - what it is
        *,
        device: str = "",
        size: int | str | None = None,
        progress: Progress | None = None,
    ) -> Header:
        """Write its root with all that it wrote, or with `device` a disk that it was given, to a disk image: Disks.export_machine."""
        told = progress or (lambda _: None)
        return Disks(self._context).export_machine(self.id, path, format, device=device, size=size, progress=told)

    # -- what runs in it --------------------------------------------------------------------------

    def exec(
        self,
        argv: Argv,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: Stdin = b"",
        timeout: float | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
        check: bool = False,
        max_output: int = MAX_OUTPUT,
        policy: Policy | None = None,
    ) -> ExecResult:
        """Run a command to its end and return how it went; a str is a line for /bin/sh. vos.processes.Processes.exec says more.

        `policy` says what it gets from system calls, beside the machine's own rules (vos/syscalls).

        Raises InvalidState, ExecTimeout after `timeout` seconds (its process group is killed), ExecFailed with `check`,
        GuestGone, GuestProtocolError, UnsupportedByWall.
        """
        return self._processes("exec").exec(
            argv,
            env=env,
            cwd=cwd or "",
            user=user or "",
            stdin=stdin,
            timeout=timeout,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
            check=check,
            max_output=max_output,
            policy=policy,
        )

    def spawn(
        self,
        argv: Argv,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        pty: bool = False,
        size: tuple[int, int] = (24, 80),
        stdin: bool = True,
        detach: bool = False,
        policy: Policy | None = None,
    ) -> Process:
        """Start a command and return it running: with pipes, or with `pty` a terminal of `size` (rows, columns).

        It is killed when this process ends or closes the VMM, unless `detach`. Raises InvalidState, GuestGone.
        """
        return self._processes("spawn").spawn(
            argv, env=env, cwd=cwd or "", user=user or "", pty=pty, size=size, stdin=stdin, detach=detach, policy=policy
        )

    @property
    def syscalls(self) -> Syscalls:
        """What its programs get from their system calls."""
        return Syscalls(self.name, self._first.spec.syscalls, self._port, self._context.held(self.id), self._attach, self._trace)

    @property
    def memory(self) -> Memory:
        """Its memory: figures, limit, and what is in it, read and written from outside."""
        return memory.service(self._context, self.id, self.name, self._check, lambda: self.files)

    @property
    def network(self) -> Network:
        """How it is connected: ports, shape, cuts, captures."""
        return network.service(self._context, self.id, self.name, self._row, self._check)

    @property
    def devices(self) -> Devices:
        """The devices that it is given, while it runs or for its next start."""
        return Devices(self.name, MachineDevices(self._context, self.id), lambda: self.files, self._context.servers(self.id))

    @property
    def files(self) -> Files:
        """The files in it, while it runs."""
        return Files(self._processes("files"))

    def forward(self, guest_port: int, host_port: int = 0, host: str = "127.0.0.1") -> Forward:
        """Listen on a port of this host (0: a free one) and join each connection to `guest_port` in the machine.

        Needs no network in the machine. It lasts until it is closed, or this process ends.
        """
        self._check("forward")
        return forward(self._processes("forward"), guest_port, host_port, host)

    def stats(self, timeout: float = 5.0) -> Stats:
        """Return what it takes now. Raises InvalidState unless it runs or is paused."""
        row = self._check("stats")
        usage = self._context.engine(row.spec.wall, row.name).usage(self._context.box(row))
        said = guest.stats(self._processes("stats"), timeout) if row.state is State.RUNNING else {}
        return Stats(private=usage.private, shared=usage.shared, cpu_seconds=usage.cpu_seconds, guest=said)

    def logs(self, *, source: str = "serial", follow: bool = False) -> Iterator[bytes]:
        """Return an iterator over a log of its current or last life: serial (the console), init (PID 1), engine,
        program (what was launched), or all.

        With `follow` it goes on until the machine ends. What the guest wrote is handed on as it is.
        """
        return logs.read(self._folder, source, self._lives if follow else None)

    # -- as a context -----------------------------------------------------------------------------

    def ephemeral(self) -> Self:
        """Have the end of the `with` that this object is used in delete the machine, whatever its state."""
        self._deleted_at_exit = True
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._deleted_at_exit:
            # Deleted inside the `with` is as good.
            with suppress(NotFound):
                self.delete(force=True)

    def __repr__(self) -> str:
        return f"<Machine {self.name} ({self.id})>"

    # -- inside -----------------------------------------------------------------------------------

    def _row(self) -> Row:
        row = reconcile.settle(self._context, self._context.row(self.id))
        if row is None:
            raise NotFound(f"machine {self.name} is gone", machine=self.name, hint="it was deleted")
        return row

    def _check(self, verb: str) -> Row:
        row = self._row()
        check(row.name, row.state, verb)
        return row

    def _lives(self) -> bool:
        try:
            return self._row().state in reconcile.LIVE
        except NotFound:
            return False

    def _processes(self, verb: str) -> Processes:
        known: list[int] = []

        def starved() -> bool:
            return memory.starved(self._context, self.id, lambda: self.files, known[0] if known else 0)

        wanted = self._wanted()
        env = self._first.spec.env
        return Processes(self._line_for(verb, known), self.name, env, self.syscalls, starved, user=wanted.user, cwd=wanted.cwd)

    def _trace(self, *args: Any, **named: Any) -> Trace:
        return self._processes("exec").trace(*args, **named)

    def _attach(self, compiled: Compiled) -> Attachment:
        """Have this process's handlers answer the command that what was compiled goes with."""
        assert compiled.policy is not None
        port, handlers = self._port(), compiled.policy.handlers
        listener: Listener
        if port.answer is not None:
            listener = direct.dial(port.answer, compiled.token, self.name)
        else:
            calls = [name for handler in handlers for name in handler.calls]
            spares = self._context.held(self.id).carriers
            listener = remote.dial(self._processes("exec"), compiled.token, calls, port.machine or os.uname().machine, spares)
        supervisor = self._context.supervisor(self.id, self.name)
        return supervisor.attach(listener, handlers, ruled=compiled.ruled, refused=compiled.refused)

    def _port(self) -> SyscallPort:
        return self._context.engine(self.wall, self.name).syscalls(self._context.box(self._first))

    def _line_for(self, verb: str, killed: list[int]) -> Callable[[], Line]:
        """Return what checks that a verb is legal and gives the line; it puts into `killed` how many kills for memory are known by then."""

        def line() -> Line:
            killed[:] = [self._check(verb).oom_kills]
            return self._context.lines.of(self.id, self._folder.line, self.name).get()

        return line
