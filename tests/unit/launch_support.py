"""Keepers with real engines that need no QEMU: tvinit's own guest mode, or a script that plays a guest."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivisor.core.paths import MachineDir
from trivisor.core.process import start_time
from trivisor.launch import keeper, tvinit
from trivisor.launch.plan import Op, Plan, encode

GUEST: Plan = (("exec", str(tvinit.path()), "guest", "--fd", "3"),)

SCRIPT = r"""
import os, struct, sys, time
line = 3
def read(n):
    data = b""
    while len(data) < n:
        part = os.read(line, n - len(data))
        if not part:
            sys.exit(9)
        data += part
    return data
def frame(type, stream, payload=b""):
    return struct.pack("<BBHII", 0x54, type, 0, len(payload), stream) + payload
def next_frame():
    head = b"\0"
    while head == b"\0":
        head = read(1)
    _, type, _, length, stream = struct.unpack("<BBHII", head + read(11))
    return type, stream, read(length)
def synced(version=1):
    while (got := next_frame())[0] != 1:
        pass
    os.write(line, frame(2, 0, got[2][:16] + struct.pack("<I", version)))
"""
"""What an engine that plays a guest begins with."""


def script(code: str) -> Plan:
    """An engine that plays a guest with `code`, after SCRIPT."""
    return (("exec", sys.executable, "-S", "-E", "-c", SCRIPT + code),)


@dataclass
class Life:
    """A machine that a keeper keeps."""

    machine: MachineDir
    kept: keeper.Kept

    def connect(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(10)
        line.connect(str(self.machine.line))
        return line

    def wait_end(self, timeout: float = 10) -> keeper.Exit | None:
        """Wait, on an idle client's end of file, until the machine has ended."""
        with contextlib.suppress(OSError), self.connect() as line:
            line.settimeout(timeout)
            line.recv(1)
        assert not keeper.alive(self.machine)
        return keeper.ended(self.machine)


@contextlib.contextmanager
def life(
    folder: Path, engine: Plan = GUEST, *, helpers: Mapping[str, Plan] | None = None, serial: int | None = None, **options: Any
) -> Iterator[Life]:
    """Spawn a machine in `folder`; whatever happens, it is dead at the end. `serial` is written by the caller."""
    machine = MachineDir(folder)
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        output, error = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, output)
        stack.callback(os.close, error)
        given: tuple[Op, ...] = (("fd", str(theirs.fileno()), "3"), ("fd", str(error), "2"))
        plan = (*(op for op in engine if op[0] != "exec"), *given, engine[-1])
        processes = [keeper.Process(name, plan) for name, plan in (helpers or {}).items()] + [keeper.Process("engine", plan)]
        logs = {"engine": output} | ({"serial": serial} if serial is not None else {})
        try:
            options.setdefault("wait", 10)
            kept = keeper.spawn(machine, processes=processes, line_fd=ours.fileno(), logs=logs, fds=[theirs.fileno(), error], **options)
            stack.close()
            yield Life(machine, kept)
        finally:
            keeper.kill(machine)


def launch(plan: Plan, *, fds: tuple[int, ...] = (), timeout: float = 20) -> subprocess.CompletedProcess[bytes]:
    """Run a plan with `tvinit launch`."""
    with open(os.memfd_create("plan"), "r+b") as memory:
        memory.write(encode(plan))
        memory.flush()
        memory.seek(0)
        argv = [str(tvinit.path()), "launch", str(memory.fileno())]
        return subprocess.run(
            argv, pass_fds=[memory.fileno(), *fds], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack("<BBHII", 0x54, kind, 0, len(payload), stream) + payload


def read_frame(line: socket.socket) -> tuple[int, int, bytes]:
    """Read one frame; (0, 0, b"") at the end of the line."""
    head = line.recv(12, socket.MSG_WAITALL)
    if len(head) < 12:
        return 0, 0, b""
    _, kind, _, length, stream = struct.unpack("<BBHII", head)
    return kind, stream, line.recv(length, socket.MSG_WAITALL) if length else b""


def info(line: socket.socket) -> dict[str, str]:
    line.sendall(frame(0x40, 1))
    kind, stream, payload = read_frame(line)
    assert (kind, stream) == (0x41, 1)
    return dict(row.split("=") for row in payload.decode().splitlines())


def gone(pid: int) -> bool:
    """Say whether a process has ended (a zombie that its parent has not reaped has)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    return start_time(pid) is None


def in_child(work: Callable[[], str], uid: int | None = None) -> str:
    """Run `work` in a forked child, as `uid` if given, and return what it returned; its errors fail the test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            text = work()
            code = 0
        except BaseException as error:
            text = repr(error) + "".join(getattr(error, "__notes__", []))
        os.write(writer, text.encode())
        os._exit(code)
    os.close(writer)
    with open(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, said
    return said
