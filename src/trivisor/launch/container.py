"""The container wall's launch plan: pure composition, from what a machine is given to the operations that make it.

The root is an overlay of the image's tree and the machine's own layer. Everything in it is made by one child in its own
namespaces, which then becomes the machine's PID 1 (`guest`) without an exec: no program of ours lies in the container.
What stands between its programs and the host, outside in:

user namespace      root inside is nobody outside: ids of the machine's own range (as root), or the caller's (rootless)
the other namespaces, the root and a /proc and /sys of its own, as far as Docker masks them or makes them read-only
capabilities        Docker's default set, in the bounding set too; no_new_privs, so that no program gets back what is gone
Landlock            a domain: mounts stay as they are, nobody outside is traced
seccomp                 Docker's default for that set around each command and builtin. Around PID 1, and so around all, is a wider
                        filter with what a policy may have answered: between filters an errno outranks a notification
PID 1               cannot be looked into or traced (its memory was made in the host's user namespace and is not dumpable),
                    and holds no descriptor of the host but its end of the line and of the log
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trivisor.launch import seccomp
from trivisor.launch.jail import Bind
from trivisor.launch.plan import Op, Plan

CAPS = (
    "chown", "dac_override", "fsetid", "fowner", "mknod", "net_raw", "setgid", "setuid", "setfcap", "setpcap", "net_bind_service",
    "sys_chroot", "kill", "audit_write",
)  # fmt: skip
"""Docker's default set."""
NAMESPACES = ("user", "mount", "pid", "net", "ipc", "uts", "cgroup", "time")
MASKED = (
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys/fs/cgroup")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = (("/proc/self/fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr"), ("pts/ptmx", "ptmx"))
OPEN_FILES = 1 << 20
_TTY_GROUP = 5
_MIN_SHARED = 16 << 20

Range = tuple[int, int, int]
"""First id inside, first id outside, how many (user_namespaces(7))."""


@dataclass(frozen=True)
class Ids:
    """Which ids a machine has. The same ranges hold for users and groups unless `groups` says otherwise."""

    users: tuple[Range, ...]
    groups: tuple[Range, ...]
    mapped: bool = False
    """The ids on the disk of its image and volumes are taken for ids inside (idmapped mounts); else they are ids outside."""

    @property
    def owner(self) -> tuple[int, int]:
        """The ids outside of root inside."""
        return self.users[0][1], self.groups[0][1]

    def plan(self) -> Plan:
        """Return the operations that map them."""
        lines = [("map-user", line) for line in self.users] + [("map-group", line) for line in self.groups]
        return tuple((kind, *(str(number) for number in line)) for kind, line in lines)

    def has_group(self, gid: int) -> bool:
        return any(first <= gid < first + count for first, _, count in self.groups)


@dataclass(frozen=True)
class Layer:
    """One overlay: what is read (`lower`), where it lies in the machine, and where what is written goes."""

    lower: Path
    upper: Path | int
    """A folder that holds `upper` and `work`, or the size in bytes of a tmpfs."""
    target: str = "/"
    device: Path | None = None
    """A block device with an ext4, in which the folder lies; None: it is one of the host's."""
    names: tuple[str, ...] = ()
    """Where what is read are several folders: these below `lower`, the uppermost first."""
    above: Path | None = None
    """A folder that is read above all those."""

    @property
    def read(self) -> tuple[str, ...]:
        """What is read beside `lower`, as a plan names it."""
        return self.names if self.above is None else (str(self.above), *(self.names or (".",)))

    @property
    def word(self) -> str:
        """Where what is written goes, as a plan says it."""
        if isinstance(self.upper, int):
            return f"ram:{self.upper}"
        return f"disk:{self.device}:{self.upper}" if self.device else str(self.upper)


@dataclass(frozen=True)
class Container:
    """All that a machine's plan depends on. Descriptors are of the process that carries the plan out."""

    hostname: str
    machine_id: str
    ids: Ids
    layers: Sequence[Layer]
    """The first is the root."""
    line: int
    """The guest's end of the line."""
    answer: int
    """PID 1's end of the pair by which it hands listeners over (guest/PROTOCOL.md, "Answers")."""
    log: int
    """What PID 1 says before the line stands, and what kills it."""
    memory: int
    namespaces: Sequence[str] = NAMESPACES
    netns: int | None = None
    """A network namespace to join instead of a new one."""
    outward: Plan = ()
    """What gives the new one its interface."""
    host_network: bool = False
    cgroups: Sequence[int] = ()
    hierarchies: Sequence[tuple[str, str]] = ()
    """What it sees of its control groups: places below /sys/fs/cgroup and the controllers of version 1 there, ("", "") for
    version 2. Programs look there for how much memory and processor time they have."""
    binds: Sequence[Bind] = ()
    tmpfs: Mapping[str, int] = field(default_factory=dict)
    """Folders in memory, and how many bytes each may hold."""
    """Volumes. The flag `idmap` is added where the ids are mapped."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Of the hooks; commands get theirs with each exec."""
    dns: Sequence[str] = ()
    hosts: str = ""
    """More lines for /etc/hosts."""
    open_files: int = OPEN_FILES
    apparmor: str = ""
    volatile: bool = False
    """What is written need not survive the host: nothing is waited for."""
    hide: Sequence[str] = ()
    """More paths to mask."""
    merge: bool = False
    """The host's kernel may keep its programs' pages once with equal ones of others."""


def plan(c: Container) -> Plan:
    """Return the plan. The order is PROTOCOL.md's; nothing is looked at."""
    return (*_outside(c), *_root(c), *_devices(c), *_kernel(c), *_names(c), *_volumes(c), ("pivot", "rw"), *_confined(c), *_end(c))


def _outside(c: Container) -> Iterator[Op]:
    if c.cgroups:
        yield ("cgroup", *(str(fd) for fd in c.cgroups))
    own_network = c.netns is None and not c.host_network
    yield ("namespaces", *(name for name in c.namespaces if own_network or name != "net"))
    if c.netns is not None:
        yield ("netns", str(c.netns))
    yield from c.ids.plan()
    yield ("hostname", c.hostname)
    if own_network:
        yield ("loopback",)
        yield from c.outward


def _root(c: Container) -> Iterator[Op]:
    # On the host's own root, which the child can reach whoever it is; nobody else sees it.
    yield ("root", "/")
    flags = ["idmap"] if c.ids.mapped else []
    # Overlayfs in a user namespace keeps its marks in the user's own extended attributes.
    flags += ["userxattr", *(["volatile"] if c.volatile else [])]
    for layer in c.layers:
        yield ("overlay", str(layer.lower), layer.word, ",".join(flags), layer.target, *layer.read)


def _devices(c: Container) -> Iterator[Op]:
    shared = max(_MIN_SHARED, c.memory // 2)
    yield ("mount", "tmpfs", "dev", "/dev", "rw", "mode=0755,size=1m,nr_inodes=1k")
    for name in DEVICES:
        yield ("bind", f"/dev/{name}", f"/dev/{name}", "rw,dev,alone")
    for target, name in DEVICE_LINKS:
        yield ("link", target, f"/dev/{name}")
    group = f",gid={_TTY_GROUP}" if c.ids.has_group(_TTY_GROUP) else ""
    yield ("mount", "devpts", "devpts", "/dev/pts", "rw,dev", f"mode=0620,ptmxmode=0666{group}")
    yield ("mount", "tmpfs", "shm", "/dev/shm", "rw", f"mode=1777,size={shared}")
    yield ("mount", "mqueue", "mqueue", "/dev/mqueue", "rw", "")
    yield ("mount", "tmpfs", "run", "/run", "rw,exec", f"mode=0755,size={shared}")


def _kernel(c: Container) -> Iterator[Op]:
    yield ("mount", "proc", "proc", "/proc", "rw", "")
    # A sysfs shows a network namespace, and may be mounted only by who owns that.
    yield ("bind", "/sys", "/sys", "ro,alone") if c.host_network else ("mount", "sysfs", "sysfs", "/sys", "ro", "")
    if any(place for place, _ in c.hierarchies):
        yield ("mount", "tmpfs", "cgroup", "/sys/fs/cgroup", "rw", "mode=0755,size=64k")
    for place, controllers in c.hierarchies:
        yield ("mount", "cgroup" if place else "cgroup2", "cgroup", f"/sys/fs/cgroup/{place}".rstrip("/"), "ro", controllers)
    yield ("mask", *MASKED, *c.hide)
    yield ("readonly", *READONLY)


def names(hostname: str, machine_id: str, dns: Sequence[str], *, hosts: str = "", within: Sequence[str] = ()) -> Iterator[Op]:
    """Yield what lays the files over a root that say which machine this is: of the plan's root, or of one `within` it."""
    known = f"127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n{hosts}"
    yield ("text", "/etc/hostname", "0644", f"{hostname}\n", *within)
    yield ("text", "/etc/hosts", "0644", known, *within)
    yield ("text", "/etc/machine-id", "0444", f"{machine_id}\n", *within)
    yield ("text", "/etc/resolv.conf", "0644", "".join(f"nameserver {address}\n" for address in dns), *within)


def _names(c: Container) -> Iterator[Op]:
    return names(c.hostname, c.machine_id, c.dns, hosts=c.hosts)


def _volumes(c: Container) -> Iterator[Op]:
    for bind in c.binds:
        yield ("bind", str(bind.source), bind.target, bind.flags + (",idmap" if c.ids.mapped else ""))
    for target, size in c.tmpfs.items():
        yield ("mount", "tmpfs", "tmpfs", target, "rw,exec", f"mode=1777,size={size}")


def _confined(c: Container) -> Iterator[Op]:
    yield ("rlimit", "core", "0", "0")
    yield ("rlimit", "nofile", str(min(4096, c.open_files)), str(c.open_files))
    if c.merge:
        yield ("merge",)
    yield ("caps", *CAPS)
    if c.apparmor:
        yield ("apparmor", c.apparmor)
    yield ("no-new-privs",)
    yield ("landlock-domain",)
    yield ("seccomp", seccomp.outer_profile().hex())
    yield ("exec-seccomp", seccomp.container_profile().hex())


def _end(c: Container) -> Iterator[Op]:
    if c.env:
        yield ("env", *(f"{key}={value}" for key, value in c.env.items()))
    yield ("hooks",)
    yield ("answer", str(c.answer))
    yield ("fd", str(c.log), "2")
    yield ("guest", str(c.line))
