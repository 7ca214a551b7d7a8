"""A machine to an OCI bundle's config.json (OCI runtime specification, config.md, config-linux.md). Pure.

Every path is the one inside the jail that runsc runs in (jailed.py), so the bundle says nothing of the host.

Root inside has every capability: it is power over the Sentry's kernel alone, as root of the vm wall has it over its own. What
the Sentry itself may do is the jail's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROOT = "/box/root"
GUEST = "/box/guest"
"""Holds tvinit and the folder of the socket that it calls."""
DOOR = "door"
VOLUMES = "/box/volumes"
INSIDE = "/.trivisor"
"""Where the machine finds GUEST."""

_CAPS = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT",
    "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE",
    "AUDIT_CONTROL", "SETFCAP", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND",
)  # fmt: skip
"""Those that runsc of 2022 and later know; it refuses a name that it does not know."""
_OPEN_FILES = 1 << 20
_OUR_NETWORK = "/proc/1/ns/net"
"""runsc is PID 1 in its jail."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LEAST_SHARED = 16 << 20


@dataclass(frozen=True)
class Shared:
    """A volume: where it lies in the machine."""

    target: str
    readonly: bool


def config(
    *,
    hostname: str,
    memory: int,
    argv: Sequence[str] = (f"{INSIDE}/tvinit", "guest", "--connect", f"{INSIDE}/{DOOR}/line"),
    env: Mapping[str, str] | None = None,
    volumes: Sequence[Shared] = (),
    tmpfs: Mapping[str, int] | None = None,
    root: str = ROOT,
) -> dict[str, Any]:
    """Return the config of a machine with `memory` bytes and `env` for all its commands. Its network is that of the jail."""
    caps = [f"CAP_{name}" for name in _CAPS]
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": root},
        "process": {
            "args": list(argv),
            "env": [f"{key}={value}" for key, value in ({"PATH": _PATH, "HOME": ""} | dict(env or {})).items()],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), caps),
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": _OPEN_FILES}],
        },
        "mounts": [
            *_system(max(_LEAST_SHARED, memory // 2)),
            *(_volume(number, volume) for number, volume in enumerate(volumes)),
            *(_in_memory(target, size) for target, size in (tmpfs or {}).items()),
        ],
        "linux": {"namespaces": [*({"type": kind} for kind in ("pid", "mount", "ipc", "uts")), {"type": "network", "path": _OUR_NETWORK}]},
    }


def _system(shared: int) -> list[dict[str, Any]]:
    kernel = ["nosuid", "nodev", "noexec"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": kernel},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*kernel, "ro"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777", f"size={shared}"]},
        {"destination": "/run", "type": "tmpfs", "source": "run", "options": ["nosuid", "nodev", "mode=0755", f"size={shared}"]},
        {"destination": INSIDE, "type": "bind", "source": GUEST, "options": ["rbind", "ro"]},
        # The Sentry lays a tmpfs over an empty /tmp unless something else is said to lie there. It passes over what it does not know, so
        # /tmp is a folder of the root, as behind the other walls.
        {"destination": "/tmp", "type": "left-as-it-is", "source": "tmp", "options": []},
    ]


def _in_memory(target: str, size: int) -> dict[str, Any]:
    return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777", f"size={size}"]}


def _volume(number: int, volume: Shared) -> dict[str, Any]:
    options = ["rbind", "ro" if volume.readonly else "rw", "nodev", "nosuid"]
    return {"destination": volume.target, "type": "bind", "source": f"{VOLUMES}/{number}", "options": options}
