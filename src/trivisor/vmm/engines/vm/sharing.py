"""Folders that a virtual machine shares with the host.

virtiofs, where there is root and a virtiofsd: a daemon a folder, as root since it must act as any of the guest's users, but in
namespaces of its own with nothing in them but that folder, and with the capabilities alone that files take. 9p else, by QEMU
itself in its jail, which needs a kernel that has it ("full") and writes files as the caller, or as root by the folder's owner: an
idmapped mount shows QEMU, which has an id of its own and no capability, that owner's files as its own; of others' it gets what
everybody gets. What the guest believes of owners, modes and links is kept in extended attributes (mapped-xattr): a guest can put
no symbolic link and no setuid file into the folder (devices and fifos its filter refuses), and QEMU opens paths part by part and
follows no link. All that its root holds is the folder and QEMU's own files, so one that was led astray would find nothing.

The daemon's socket is bound and connected here, before either side runs: nobody has to poll for it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import HostLacks, InvalidSpec
from trivisor.core.paths import MachineDir
from trivisor.core.process import find, run
from trivisor.core.spec import Spec
from trivisor.launch import jail, tvinit
from trivisor.launch.jail import Bind
from trivisor.launch.keeper import Process
from trivisor.launch.plan import Op, Plan, encode
from trivisor.vmm.engines.vm.argv import MAX_SHARES, SHARE, Shares

_DAEMONS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
_PACKAGES = "apt-get install qemu-system-common (Debian 12) or virtiofsd (later)"
_CAPS = ("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "mknod", "setfcap", "setgid", "setpcap", "setuid", "sys_chroot")
_LISTEN_FD = 3


@dataclass(frozen=True)
class Given:
    """What a QEMU with shared folders is run with."""

    processes: tuple[Process, ...] = ()
    fds: tuple[int, ...] = ()
    """All descriptors that the daemons' plans name."""
    sockets: tuple[tuple[int, int], ...] = ()
    """Descriptors for QEMU, and their numbers there."""
    binds: tuple[Bind, ...] = ()
    """What QEMU must see itself (9p)."""


def shares(spec: Spec) -> Shares | None:
    """Return how `spec`'s volumes are shared, None if it has none. Raises InvalidSpec, HostLacks."""
    if not spec.volumes:
        return None
    if len(spec.volumes) > MAX_SHARES:
        raise InvalidSpec(f"a machine on the vm wall may have {MAX_SHARES} volumes, not {len(spec.volumes)}")
    readonly = tuple(volume.readonly for volume in spec.volumes.values())
    root = os.geteuid() == 0
    if root and _daemon() is not None:
        return Shares("virtiofs", readonly)
    why, remedy = ("virtiofsd is not installed", f"{_PACKAGES}, or ") if root else ("there is no root", "")
    if spec.kernel == "micro":
        raise HostLacks(f"{why}: then folders are shared by 9p, which the micro kernel has not", hint=f'{remedy}give kernel="full"')
    if not jail.probe().namespaces:
        raise HostLacks(f"{why}, and 9p needs namespaces: {jail.probe().why}", hint=f"{remedy}{jail.probe().remedy}")
    return Shares("9p", readonly)


def steps(spec: Spec, found: Shares | None, modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the guest's side of it."""
    if found is None:
        return []
    made: list[tuple[str, ...]] = [("module", *modules)] if modules else []
    for number, (target, volume) in enumerate(spec.volumes.items()):
        made.append(("share", f"share{number}", target, found.kind, "ro" if volume.readonly else "rw"))
    return made


def give(stack: ExitStack, place: MachineDir, spec: Spec, found: Shares | None, log: int) -> Given:
    """Make what QEMU is run with; `stack` closes it. `log` takes what the daemons say."""
    if found is None:
        return Given()
    if found.kind == "9p":
        modes = {True: "ro,straight,alone,owner", False: "rw,straight,alone,owner"}
        binds = [
            Bind(Path(volume.source), f"/shares/{number}", modes[volume.readonly]) for number, volume in enumerate(spec.volumes.values())
        ]
        return Given(binds=tuple(binds))
    daemon = _daemon()
    assert daemon is not None
    libraries = _libraries(daemon)
    processes, fds, sockets = [], [], []
    for number, volume in enumerate(spec.volumes.values()):
        listener, client = _connected(stack, place.root / f"share{number}.sock")
        plan = _plan(daemon, libraries, place.root / f"share{number}", volume.source, listener, log, readonly=volume.readonly)
        processes.append(Process(f"share{number}", plan))
        fds += [listener, client]
        sockets.append((client, SHARE + number))
    return Given(tuple(processes), tuple(fds), tuple(sockets))


def serve(stack: ExitStack, place: MachineDir, name: str, source: str, *, readonly: bool) -> int:
    """Start a daemon for one folder, for a machine that runs, and return the socket to it, which `stack` closes.

    It ends when QEMU hangs up, and so does not outlive the machine. Raises HostLacks, EngineError.
    """
    daemon = _daemon()
    if os.geteuid() != 0 or daemon is None:
        raise HostLacks("a folder for a machine that runs needs root and virtiofsd", hint=_PACKAGES)
    listener, client = _connected(stack, place.root / f"{name}.sock")
    with open(os.devnull, "r+b") as nothing, open(os.memfd_create("plan"), "r+b") as memory:
        plan = _plan(daemon, _libraries(daemon), place.root / name, source, listener, nothing.fileno(), readonly=readonly)
        memory.write(encode(plan))
        memory.flush()
        memory.seek(0)
        held = [memory.fileno(), listener, nothing.fileno()]
        command = [str(tvinit.path()), "launch", str(memory.fileno())]
        started = subprocess.Popen(command, pass_fds=held, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    # It may outlive us, and then is init's; while we live somebody must ask how it ended.
    threading.Thread(target=started.wait, name="folder", daemon=True).start()
    return client


def _daemon() -> str | None:
    return next((path for path in _DAEMONS if os.access(path, os.X_OK)), None) or shutil.which("virtiofsd")


def _libraries(program: str) -> list[str]:
    output = run([find("ldd", "libc-bin"), program], timeout=10).decode(errors="replace")
    return sorted({str(Path(word).parent) for word in re.findall(r"(?:=>\s+|^\s+)(/\S+) \(0x", output, re.MULTILINE)})


def _connected(stack: ExitStack, path: Path) -> tuple[int, int]:
    """Listen at `path` and connect to it: the connection waits until the daemon takes it. The name is needed no longer."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Through the folder's descriptor: a path may be longer than a socket's address.
        name = f"/proc/self/fd/{folder}/{path.name}"
        path.unlink(missing_ok=True)
        listener.bind(name)
        listener.listen(1)
        client.connect(name)
        path.unlink()
    finally:
        os.close(folder)
    return listener.fileno(), client.fileno()


def _plan(daemon: str, libraries: Sequence[str], root: Path, source: str, listener: int, log: int, *, readonly: bool) -> Plan:
    root.mkdir(mode=0o700, exist_ok=True)
    operations: list[Op] = [("namespaces", "mount", "pid", "net", "ipc", "uts", "cgroup"), ("root", str(root))]
    operations.append(("bind", daemon, daemon, "ro,exec"))
    operations += [("bind", folder, folder, "ro,exec") for folder in libraries]
    operations.append(("bind", source, "/share", "ro,straight" if readonly else "rw,exec,straight"))
    operations += [("dir", "/run", "0755"), ("mount", "proc", "proc", "/proc", "rw", ""), ("pivot",)]
    operations += [("rlimit", "core", "0", "0"), ("caps", *_CAPS), ("no-new-privs",)]
    operations += [("fd", str(listener), str(_LISTEN_FD)), ("fd", str(log), "1"), ("fd", str(log), "2")]
    argv = [daemon, f"--fd={_LISTEN_FD}", "-f", "-o", "source=/share", "-o", "sandbox=chroot", "-o", "log_level=err"]
    operations.append(("exec", *argv))
    return tuple(operations)
