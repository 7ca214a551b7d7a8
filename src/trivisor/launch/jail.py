"""The jail that engines run in: their own namespaces and root, only their files, no privileges, a seccomp filter, Landlock.

QEMU's project does not count TCG as a security boundary, so what stands between a guest that has taken QEMU and
the host is this. Three shapes, chosen by `probe`, which tries them for real:

root            no user namespace; an id of its own for each machine (2000000000 + slot)
rootless        a user namespace in which only the caller's own id exists
no namespaces   where the host forbids them: no_new_privs, seccomp and Landlock alone

What a shape lacks is said in `JailReport.lacks`, for doctor and info().
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trivisor.launch import seccomp, tvinit
from trivisor.launch.plan import Op, Plan, encode

FIRST_ID = 2_000_000_000
"""Ids that no account has (systemd's ranges end below): one a machine, by its slot."""
SLOTS = 100_000_000
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
TRIAL_TIMEOUT = 10.0

_NAMESPACES = ("mount", "pid", "net", "ipc", "uts", "cgroup")
_NR_LANDLOCK_CREATE_RULESET = 444
USAGE = 2
"""What tvinit exits with when it is told nothing: it ran."""


@dataclass(frozen=True)
class Bind:
    """A host file or folder that the program may see, at `target`. `flags`: ro or rw, exec, dev, comma-separated.

    Keep `target` equal to the source where you can: without namespaces nothing can be moved.
    """

    source: Path
    target: str
    flags: str = "ro"


@dataclass(frozen=True)
class JailReport:
    """What this host gives to a jail. `why` and `remedy` say why there are no namespaces, else are empty."""

    namespaces: tuple[str, ...]
    own_id: bool
    """Each machine has a host id of its own."""
    landlock: int
    """The ABI that the kernel speaks (landlock(7)); 0: none."""
    why: str = ""
    remedy: str = ""

    @property
    def lacks(self) -> tuple[str, ...]:
        """What a full jail has and this one has not, in words."""
        lacks = []
        if not self.namespaces:
            lacks.append("namespaces")
        if not self.own_id:
            lacks.append("an id of its own")
        if not self.landlock:
            lacks.append("Landlock")
        return tuple(lacks)

    def __str__(self) -> str:
        has = ["seccomp", *(["Landlock"] if self.landlock else []), *(["namespaces"] if self.namespaces else [])]
        has += ["an id of its own"] if self.own_id else []
        return f"{', '.join(has)}{'; lacks ' + ', '.join(self.lacks) if self.lacks else ''}"


def _landlock_abi() -> int:
    """Ask the kernel (landlock(7)); the number of the call is the same on every architecture."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_NR_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def _shapes() -> Iterator[JailReport]:
    """What could be had here, the strongest first."""
    landlock = _landlock_abi()
    if os.geteuid() == 0:
        yield JailReport(_NAMESPACES, True, landlock)
    yield JailReport(("user", *_NAMESPACES), False, landlock)
    yield JailReport((), False, landlock)


def _try(report: JailReport) -> str:
    """Run tvinit in such a jail. Returns "" if that works, else what failed."""
    program = tvinit.path()
    with tempfile.TemporaryDirectory(prefix="trivisor-jail-") as folder, open(os.memfd_create("plan"), "r+b") as memory:
        bind = Bind(program, str(program), "ro,exec")
        plan = jail([str(program), "launch"], binds=[bind], env={}, fds={}, root=Path(folder), slot=0, network="none", report=report)
        memory.write(encode(plan))
        memory.flush()
        memory.seek(0)
        try:
            done = subprocess.run(
                [program, "launch", str(memory.fileno())],
                pass_fds=[memory.fileno()],
                capture_output=True,
                timeout=TRIAL_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"a trial took over {TRIAL_TIMEOUT:g} s"
    if done.returncode == USAGE:
        return ""
    return done.stderr.decode(errors="replace").strip() or f"a trial exited with {done.returncode}"


_SWITCHES = (
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
)


def remedy() -> str:
    """Return what to do on a host that refuses user namespaces."""
    for path, value, switch in _SWITCHES:
        try:
            if Path(path).read_text().strip() == value:
                return switch
        except OSError:  # this kernel has no such switch
            continue
    return "in a container: allow user namespaces (its seccomp profile and masked paths), or run it with --privileged"


@functools.cache
def _probe(_uid: int) -> JailReport:
    why = ""
    for shape in _shapes():
        fault = _try(shape)
        if not fault:
            if shape.namespaces:
                return shape
            return JailReport((), False, shape.landlock, why, remedy())
        why = fault
    # Not even seccomp alone: nothing is tried any more, the engine's start will say what fails.
    return JailReport((), False, 0, why, remedy())


def probe() -> JailReport:
    """Return what this host gives, by trying it; the verdict is kept for this process and user. Takes some 10 ms."""
    return _probe(os.geteuid())


def own_id(slot: int, report: JailReport | None = None) -> int | None:
    """Return the host uid (and gid) that machine `slot` runs as, for callers to chown its files to; None: the caller's own."""
    return FIRST_ID + slot % SLOTS if (report or probe()).own_id else None


def _new_root(binds: Sequence[Bind], root: Path) -> Iterator[Op]:
    yield ("root", str(root))
    for device in DEVICES:
        yield ("bind", device, device, "rw,dev")
    for bind in binds:
        yield ("bind", str(bind.source), bind.target, bind.flags)
    yield ("pivot",)


def _rights(flags: str) -> str:
    words = flags.split(",")
    return "r" + ("w" if "rw" in words else "") + ("x" if "exec" in words else "")


def jail(
    argv: Sequence[str],
    *,
    binds: Sequence[Bind],
    env: Mapping[str, str],
    fds: Mapping[int, int],
    root: Path,
    slot: int,
    network: Literal["none", "host"],
    groups: Sequence[int] = (),
    report: JailReport | None = None,
) -> Plan:
    """Return the plan that runs `argv` jailed.

    `fds` maps descriptors of the plan's process to those of the program, which gets no others but 0, 1 and 2. `root` is an
    existing empty folder to mount the new root on. `groups` are supplementary (kvm's), where the machine has its own id.
    The binds are all that the program sees of the host's files. `network="none"` leaves it no sockets but unix ones.
    """
    report = report or probe()
    plan: list[Op] = []
    uid = own_id(slot, report)
    kept = [name for name in report.namespaces if not (name == "net" and network == "host")]
    if kept:
        plan.append(("namespaces", *kept))
        if "user" in kept:
            plan.append(("map-user", str(os.geteuid()), str(os.geteuid()), "1"))
            plan.append(("map-group", str(os.getegid()), str(os.getegid()), "1"))
        plan += _new_root(binds, root)
    plan.append(("rlimit", "core", "0", "0"))
    if uid is not None:
        plan.append(("groups", *(str(group) for group in groups)))
        plan.append(("user", str(uid), str(uid)))
    plan += [("caps",), ("no-new-privs",)]
    plan += [("landlock", device, "rw") for device in DEVICES]
    plan += [("landlock", bind.target if kept else str(bind.source), _rights(bind.flags)) for bind in binds]
    plan.append(("seccomp", seccomp.engine_profile(network == "host").hex()))
    if env:
        plan.append(("env", *(f"{key}={value}" for key, value in env.items())))
    plan += [("fd", str(source), str(target)) for source, target in fds.items()]
    plan.append(("exec", *argv))
    return tuple(plan)
