"""An engine without a virtual machine: the real keeper, the real tvinit in guest mode, a real line and real
commands, on the host itself. What is pretended is only the wall, so what is tested is the life of machines.

The guest is no PID 1, so that its power-off ends its own children and not the host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from trivisor.core.errors import EngineError, HostLacks
from trivisor.core.paths import Home
from trivisor.core.process import Who, start_time
from trivisor.core.spec import Spec, Wall
from trivisor.core.undo import Undo
from trivisor.launch import keeper, seccomp, tvinit
from trivisor.vmm.engine import Box, Progress, Usage, WallReport
from trivisor.vos.ports import SyscallPort

DISK = "disk.qcow2"
PID = "engine"


class FakeEngine:
    """`fail` names the step of create or start that fails, once; `delay` is seconds that a start takes more."""

    wall: Wall = "vm"

    def __init__(self, *, fail: str = "", delay: float = 0.0, grace: float = 5.0) -> None:
        self.fail = fail
        self.delay = delay
        self.grace = grace
        self.swept: list[set[str]] = []

    def report(self) -> WallReport:
        return WallReport(wall="vm", available=True, features={"kvm": False})

    def check(self, spec: Spec) -> None:
        if spec.kernel not in ("micro", "full"):
            raise HostLacks(f"there is no kernel {spec.kernel}", hint="give micro or full")

    def create(self, box: Box, undo: Undo) -> None:
        disk = box.dir.root / DISK
        undo.add("disk", lambda: disk.unlink(missing_ok=True))
        disk.write_bytes(b"\0" * 4096)
        self._step("disk")
        undo.add("disk formatted", lambda: None)
        self._step("disk formatted")

    def start(self, box: Box, undo: Undo, progress: Progress) -> dict[str, str]:
        progress("starting a process that is no machine")
        if not (box.dir.root / DISK).exists():
            raise EngineError("the disk is gone", machine=box.spec.name)
        with contextlib.ExitStack() as stack:
            host, guest = socket.socketpair()
            stack.callback(host.close)
            stack.callback(guest.close)
            qmp = socket.socket(socket.AF_UNIX)
            stack.callback(qmp.close)
            undo.add("control socket", lambda: box.dir.qmp.unlink(missing_ok=True))
            _bind(qmp, box.dir.qmp)
            self._step("control socket")
            undo.add("keeper spawned", lambda: keeper.kill(box.dir))
            kept = self._spawn(box, host, guest, stack)
            self._step("keeper spawned")
            _write_pid(box.dir.root, Who(kept.engine_pid, start_time(kept.engine_pid) or 0))
            undo.add("guest answered", lambda: None)
            time.sleep(self.delay)
            self._step("guest answered")
        return {"engine": str(kept.engine_pid), "keeper": str(kept.keeper_pid)}

    def pause(self, box: Box) -> None:
        self._signal(box, signal.SIGSTOP, stopped=True)

    def resume(self, box: Box) -> None:
        self._signal(box, signal.SIGCONT, stopped=False)

    def paused(self, box: Box) -> bool:
        return _stat(_engine(box).pid) == "T"

    def usage(self, box: Box) -> Usage:
        return Usage(private=1 << 20, shared=0, cpu_seconds=0.5)

    def syscalls(self, box: Box | None = None) -> SyscallPort:
        return SyscallPort(self.wall, frozenset({"kernel", "trace", "no-vdso"}), seccomp.OPEN)

    def sweep(self, home: Home, machines: set[str]) -> list[str]:
        self.swept.append(set(machines))
        return []

    def _spawn(self, box: Box, host: socket.socket, guest: socket.socket, stack: contextlib.ExitStack) -> keeper.Kept:
        logs: dict[str, int] = {}
        fds = [guest.fileno()]
        for name in ("serial", "engine"):
            read, write = os.pipe()
            stack.callback(os.close, read)
            stack.callback(os.close, write)
            logs[name] = read
            fds.append(write)
        plan = (
            ("fd", str(guest.fileno()), "3"),
            ("fd", str(fds[1]), "1"),
            ("fd", str(fds[2]), "2"),
            ("exec", str(tvinit.path()), "guest", "--fd", "3"),
        )
        return keeper.spawn(
            box.dir,
            processes=[keeper.Process("engine", plan)],
            line_fd=host.fileno(),
            logs=logs,
            fds=fds,
            owner=box.owner,
            ttl=box.spec.ttl,
            idle=box.spec.idle,
            grace=self.grace,
            wait=20.0,
        )

    def _step(self, name: str) -> None:
        if self.fail == name:
            self.fail = ""
            raise EngineError(f"failed as it was told to at {name}", command=["fake"], status=1, output="the last words")

    def _signal(self, box: Box, number: signal.Signals, *, stopped: bool) -> None:
        engine = _engine(box)
        self._step("signal")
        with contextlib.suppress(ProcessLookupError):  # it has ended, which is said below
            os.kill(engine.pid, number)
        deadline = time.monotonic() + 30
        # kill(2) returns before the target has stopped.
        while engine.alive() and (_stat(engine.pid) == "T") != stopped and time.monotonic() < deadline:
            time.sleep(0.001)
        if not engine.alive():
            raise EngineError("the engine ended", machine=box.spec.name)


def _engine(box: Box) -> Who:
    try:
        who = Who.parse((box.dir.root / PID).read_text())
    except FileNotFoundError:
        who = None
    if who is None or not who.alive():
        raise EngineError("the engine does not answer", machine=box.spec.name)
    return who


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def _write_pid(folder: Path, who: Who) -> None:
    """Aside: a test that waits for the file reads it at once."""
    aside = folder / f"{PID}.new"
    aside.write_text(str(who))
    aside.rename(folder / PID)


def _bind(sock: socket.socket, path: Path) -> None:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        sock.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def engine_pid(folder: Path) -> int:
    """Return the pid of the engine of the machine whose folder that is."""
    who = Who.parse((folder / PID).read_text())
    assert who is not None
    return who.pid


def keeper_pid(folder: Path) -> int:
    return int((folder / "keeper").read_text().split()[0])
