"""runsc's command line and the jail that it runs in, as a launch plan. Pure.

runsc makes a sandbox by itself: the Sentry, which is the machine's kernel, with a seccomp filter and an empty root; the
gofer, which opens files for it; and the processes whose system calls it takes. All of them run inside what is made here:
their own namespaces, a user namespace among them, whose ids own nothing but the machine's files; a root that holds runsc, the
machine's root and tvinit; no_new_privs and a seccomp filter. What they keep is capabilities within that user namespace,
of which runsc's own set-up needs most: namespaces, mounts, ids, tracing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivisor.launch import seccomp
from trivisor.launch.container import Ids, Layer, names
from trivisor.launch.jail import DEVICES, Bind
from trivisor.launch.plan import Op, Plan
from trivisor.vmm.engines.gvisor import bundle
from trivisor.vmm.engines.gvisor.runsc import Runsc

PROGRAM = "/runsc"
STATE = "/run"
_BUNDLE = "/box/bundle"
_FROZEN = "/box/frozen"
NAME = "machine"
KVM = "/dev/kvm"
_HOSTS_ALONE = "/proc/sys/net/core"
_WHOLE_PROC = "/box/proc"

_CAPS = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "mknod", "net_admin", "net_raw", "setgid", "setpcap",
    "setuid", "setfcap", "sys_admin", "sys_chroot", "sys_ptrace",
)  # fmt: skip
_NAMESPACES = ("user", "mount", "pid", "net", "ipc", "uts", "cgroup")
"""Not time: the Sentry takes the host's clocks as its own."""

LACKS = ("Landlock: runsc mounts and pivots by itself", "no capabilities: runsc has some in its user namespace")
"""What a full jail has and this one has not."""


@dataclass(frozen=True)
class Link:
    """An interface that lies ready in another network namespace. The Sentry takes its packets and its address over, and its
    own network stack does the rest."""

    netns: int
    interface: str
    address: str
    prefix: str
    gateway: str


@dataclass(frozen=True)
class Sandbox:
    """All that a machine's plan depends on. Descriptors are of the process that carries the plan out."""

    runsc: Runsc
    platform: str
    ids: Ids
    namespaces: Sequence[str]
    """Those that the host offers."""
    config: dict[str, Any]
    tvinit: Path
    log: int
    memory: int
    frozen: Path | None = None
    """The folder of a checkpoint that it goes on from, instead of beginning."""
    door: Path | None = None
    """The folder with the bound socket that tvinit calls; None in a trial."""
    layers: Sequence[Layer] = ()
    """The first is the root; none in a trial."""
    machine_id: str = ""
    dns: Sequence[str] = ()
    volumes: Sequence[Bind] = ()
    """In the order of the config's."""
    tmpfs: Sequence[str] = ()
    """Where in the machine something of its memory is to lie."""
    cgroups: Sequence[int] = ()
    link: Link | None = None
    outward: Plan = ()
    """Instead: what makes an interface in the jail's own. Neither: a loopback alone."""
    volatile: bool = False
    """What is written need not survive the host: nothing is waited for."""


HOSTS_STACK = "gVisor's network stack: without ids beside root it is the host kernel's, in the machine's own namespace"


def rootless(ids: Ids) -> bool:
    """Whether runsc has to do without ids beside root: what it calls rootless."""
    return sum(count for _, _, count in ids.users) == 1


def _network(ids: Ids) -> str:
    """Whose network stack serves the machine. Without other ids beside root runsc has no use for its own, so it is that of the
    host's kernel in the jail's namespace, where nothing but the machine's interface is."""
    return "host" if rootless(ids) else "sandbox"


def command(runsc: Runsc, platform: str, ids: Ids, *, network: bool = False) -> list[str]:
    """Return runsc's argv up to the verb. Options that this runsc does not know, it does not need."""
    options = {
        "root": STATE,
        "platform": platform,
        "network": _network(ids) if network else "none",
        "host-uds": "open",
        "ignore-cgroups": "true",
        "rootless": "true" if rootless(ids) else "false",
        # Root's packets are its own network's affair, whose edge is ours.
        "net-raw": "true",
        # Its own writable layer would be gone at a stop; we give it one.
        "overlay2": "none",
        # The Sentry has no access to files but through the gofer.
        "directfs": "false",
        # A connection that leaves the machine cannot be saved: it is broken, which its programs see, instead of the checkpoint.
        "net-disconnect-ok": "true",
    }
    known = [f"--{name}={value}" for name, value in options.items() if name in runsc.options]
    return [PROGRAM, *known]


def plan(s: Sandbox) -> Plan:
    """Return the plan that runs the machine. The order is PROTOCOL.md's; nothing is looked at."""
    argv = command(s.runsc, s.platform, s.ids, network=s.link is not None or bool(s.outward))
    verb = ["restore", "--image-path", _FROZEN] if s.frozen is not None else ["run"]
    return (*_outside(s), *_files(s), *_root(s), ("pivot",), *_confined(s), ("exec", *argv, *verb, "--bundle", _BUNDLE, NAME))


def _outside(s: Sandbox) -> Iterator[Op]:
    if s.cgroups:
        yield ("cgroup", *(str(fd) for fd in s.cgroups))
    yield ("namespaces", *(name for name in _NAMESPACES if name in s.namespaces))
    if s.link is not None:
        yield ("adopt", str(s.link.netns), s.link.interface)
    yield from s.ids.plan()
    yield ("loopback",)
    if s.link is not None:
        yield ("address", s.link.interface, s.link.address, s.link.prefix, s.link.gateway)
    yield from s.outward


def _files(s: Sandbox) -> Iterator[Op]:
    yield ("root", "/")
    for device in (*DEVICES, *([KVM] if s.platform == "kvm" else [])):
        yield ("bind", device, device, "rw,dev")
    yield ("bind", s.runsc.path, PROGRAM, "ro,exec")
    yield ("text", f"{_BUNDLE}/config.json", "0644", json.dumps(s.config))
    # runsc's Sentry mounts its empty root on /tmp.
    yield ("dir", "/tmp", "0755")
    yield ("mount", "tmpfs", "state", STATE, "rw", "mode=0700,size=4m")
    yield ("mount", "proc", "proc", "/proc", "rw", "")
    # The Sentry says that it has the memory of its host, which it reads here.
    yield ("text", "/proc/meminfo", "0444", f"MemTotal: {s.memory >> 10} kB\nMemFree: {s.memory >> 10} kB\n")
    # runsc takes a namespace in which it finds a file of this folder for the host's own, where it would not touch interfaces.
    # Kernels since 6.7 show it everywhere.
    yield ("mask", _HOSTS_ALONE)
    # A /proc of which something is hidden lets nobody mount another, as the Sentry does; this one does.
    yield ("mount", "proc", "proc", _WHOLE_PROC, "rw", "")
    yield ("bind", str(s.tvinit), f"{bundle.GUEST}/tvinit", "ro,exec")
    if s.frozen is not None:
        yield ("bind", str(s.frozen), _FROZEN, "ro")
    if s.door is not None:
        yield ("bind", str(s.door), f"{bundle.GUEST}/{bundle.DOOR}", "ro")


def _root(s: Sandbox) -> Iterator[Op]:
    mapped = ["idmap"] if s.ids.mapped else []
    # Overlayfs in a user namespace keeps its marks in the user's own extended attributes.
    flags = ",".join([*mapped, "userxattr", *(["volatile"] if s.volatile else [])])
    if not s.layers:
        yield ("mount", "tmpfs", "root", bundle.ROOT, "rw", "mode=0755,size=1m")
    for layer in s.layers:
        yield ("overlay", str(layer.lower), layer.word, flags, bundle.ROOT + layer.target.rstrip("/"), *layer.read)
    if s.layers:
        # Here rather than by the guest, for whom each file is several trips to the gofer.
        yield from names(s.config["hostname"], s.machine_id, s.dns, within=(bundle.ROOT,))
    for target in s.tmpfs:
        # The Sentry lays its own over it; the folders that it would make itself are such that everybody may write to them.
        yield ("mount", "tmpfs", "place", bundle.ROOT + target, "rw", "mode=0755,size=4k")
    for number, volume in enumerate(s.volumes):
        yield ("bind", str(volume.source), f"{bundle.VOLUMES}/{number}", ",".join([volume.flags, *mapped]))


def _confined(s: Sandbox) -> Iterator[Op]:
    yield ("rlimit", "core", "0", "0")
    yield ("caps", *_CAPS)
    yield ("no-new-privs",)
    yield ("seccomp", seccomp.sandbox_profile().hex())
    yield ("env", "PATH=/", "TMPDIR=/tmp")
    yield ("fd", str(s.log), "1")
    yield ("fd", str(s.log), "2")
