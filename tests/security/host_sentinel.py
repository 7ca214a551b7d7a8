"""What of the host no machine may have touched: read before, read again after."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_FILES = (
    "/proc/sys/vm/swappiness",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/panic_on_oops",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/ctrl-alt-del",
    "/sys/kernel/mm/ksm/run",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/proc/swaps",
)

KEEPER_MOST = 16 << 10
"""KiB that a keeper may have: itself, 4 MiB for each client that reads slowly (MUX_CLIENT_HIGH), and what it grows that by."""


class Sentinel:
    """The host's state, and a process of the host that should outlive every attack."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "100000"])
        self._before = _state()

    def check(self) -> None:
        """Assert that all is as it was."""
        assert self.process.poll() is None, "a process of the host was killed"
        assert _state() == self._before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _state() -> dict[str, str]:
    state = {name: text for name in _FILES if (text := _read(name)) is not None}
    # Only names: how often a module is used changes all the time.
    modules = _read("/proc/modules") or ""
    state["modules"] = " ".join(sorted(line.split()[0] for line in modules.splitlines()))
    state["namespaces"] = " ".join(os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "uts", "user"))
    return state


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:  # this kernel has no such file
        return None
