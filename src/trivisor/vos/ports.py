"""What a service of the virtual operating system needs of the wall under it: plain values, which engines give and Machine wires.

vos knows no wall. A wall says here what it can do and where things are; a service compiles for that, and raises UnsupportedByWall
for what is not in `features`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import UnsupportedByWall
from trivisor.core.spec import Spec, Wall
from trivisor.launch.seccomp import Profile
from trivisor.vos.memory.kernel import Kernel

FEATURES: dict[str, tuple[str, tuple[Wall, ...]]] = {
    "kernel": ("answer system calls in the kernel", ("container", "gvisor", "vm")),
    "notify": ("answer system calls outside of the program", ("container", "vm")),
    "landlock": ("bind programs to paths", ("container", "vm")),
    "log": ("have the kernel log system calls", ("container", "vm")),
    "trace": ("trace system calls", ("container", "gvisor", "vm")),
    "no-vdso": ("take the vDSO from programs", ("container", "gvisor", "vm")),
}
"""A feature, to what it is for and the walls that may have it."""

MEMORY_FEATURES: dict[str, tuple[str, tuple[Wall, ...]]] = {
    "physical": ("show the memory of a machine", ("vm",)),
    "kernel": ("show the memory of its kernel", ("vm",)),
    "process": ("show the memory of its processes", ("container", "vm")),
}
"""The same for vos.memory."""


@dataclass(frozen=True)
class SyscallPort:
    """What one machine's wall does for vos.syscalls."""

    wall: Wall
    features: frozenset[str]
    """Of FEATURES."""
    profile: Profile
    """What a command without a policy may call."""
    answer: Path | None = None
    """The socket at which an owner with handlers attaches; None: through the line."""
    machine: str = ""
    """The guest's architecture, as os.uname() names it; "" the host's."""
    why: str = ""
    """Why a feature that the wall may have is not there on this host."""

    def need(self, feature: str, name: str = "") -> None:
        """Raise UnsupportedByWall for the machine `name` unless the wall has `feature`."""
        if feature not in self.features:
            what, walls = FEATURES[feature]
            raise UnsupportedByWall(
                f"{what}{f' ({self.why})' if self.why else ''}", self.wall, [wall for wall in walls if wall != self.wall], machine=name
            )


@dataclass(frozen=True)
class Ram:
    """A run of guest-physical memory, and where it lies in the process that runs the machine. Bytes."""

    physical: int
    size: int
    address: int
    private: bool = False
    """Whether it lies outside of the file that may be mapped."""


@dataclass(frozen=True)
class Still:
    """A machine that stands still, or is let run on: where its memory is."""

    pid: int
    """vm: the process that has its memory. container: its PID 1, as the host numbers it."""
    ram: tuple[Ram, ...] = ()
    top: int = 0
    """Physical address of the page tables in use on its first vCPU (CR3)."""
    levels: int = 4
    shared: Path | None = None
    """The file of its memory, where that may be mapped: `ram` lies in it one after the other, but for what is private."""


def _nowhere(_: bool) -> AbstractContextManager[Still]:
    raise LookupError("a wall without a feature of memory was asked where it is")


@dataclass(frozen=True)
class MemoryPort:
    """What one machine's wall does for vos.memory."""

    wall: Wall
    features: frozenset[str]
    """Of MEMORY_FEATURES."""
    hold: Callable[[bool], AbstractContextManager[Still]] = _nowhere
    """Say where the machine's memory is; with True no instruction of it runs inside the `with`."""
    kernel: Callable[[], Kernel] | None = None
    """Return what is known of its kernel. Raises NotFound."""

    def need(self, feature: str, name: str = "") -> None:
        """Raise UnsupportedByWall for the machine `name` unless the wall has `feature`."""
        if feature not in self.features:
            what, walls = MEMORY_FEATURES[feature]
            raise UnsupportedByWall(what, self.wall, [wall for wall in walls if wall != self.wall], machine=name)


@dataclass(frozen=True)
class NetworkPort:
    """What there is of one machine's network, for vos.network."""

    machine: str
    """Its id."""
    spec: Spec
    """As it is now."""
    live: bool
    """Whether it runs, or is paused."""
    control: Path
    """The socket of its network's helper, while it lives (launch/net/control.py)."""
    interface: str = ""
    """The host's end of its link; "" where it has none: without root, or while it does not run."""
    address: str = ""
    """Its own."""
    why: str = ""
    """Why there can be no link on this host."""
