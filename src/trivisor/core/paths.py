"""Where things are. One class for the home, one for a machine's folder; nobody else joins these names."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.core.folders import scatter


def default_home() -> Path:
    """Return `$TRIVISOR_HOME`, else the XDG data folder's `trivisor` (basedir-spec)."""
    if home := os.environ.get("TRIVISOR_HOME"):
        return Path(home).absolute()
    data = os.environ.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser()
    return Path(data).absolute() / "trivisor"


@dataclass(frozen=True)
class Home:
    """The folders of one home. The home is 0700 and belongs to one user."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "trivisor.db"

    @property
    def machines(self) -> Path:
        return self.root / "machines"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def kits(self) -> Path:
        return self.root / "kits"

    @property
    def ice(self) -> Path:
        return self.root / "ice"

    @property
    def cache(self) -> Path:
        """What can be made again: probe verdicts, disk templates."""
        return self.root / "cache"

    @property
    def networks(self) -> Path:
        """A folder for each named network, and in it a file for each machine on it."""
        return self.root / "networks"

    @property
    def volumes(self) -> Path:
        """A folder for each volume. Made with the first."""
        return self.root / "volumes"

    @property
    def snapshots(self) -> Path:
        """Frozen machines, a folder each, and what is kept of them."""
        return self.root / "snapshots"

    @property
    def disks(self) -> Path:
        """The store of disks that machines are given. Made with the first."""
        return self.root / "disks"

    @property
    def tmp(self) -> Path:
        """Half-made things. Each is `PID-STARTTIME-*` of its maker; the sweep removes those of the dead."""
        return self.root / "tmp"

    def machine(self, machine_id: str) -> MachineDir:
        return _machine_dir(self.root, machine_id)

    def open(self) -> None:
        """Make the folders. Raises StorageError if the home is another user's or cannot be written."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.root.stat().st_uid
            if owner != os.geteuid():
                raise StorageError(
                    f"the home {self.root} belongs to user {owner}, not to you ({os.geteuid()})",
                    hint="a home has one user: set TRIVISOR_HOME to a folder of your own (sudo keeps HOME)",
                )
            for folder in (self.store, self.kits, self.ice, self.cache):
                folder.mkdir(mode=0o700, exist_ok=True)
            for folder in (self.machines, self.snapshots, self.tmp):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700, exist_ok=True)
                    scatter(folder)
        except OSError as error:
            raise StorageError(
                f"the home {self.root} cannot be used: {error.strerror}", hint="set TRIVISOR_HOME to a writable folder"
            ) from error
        if not os.access(self.root, os.W_OK):
            raise StorageError(f"the home {self.root} is read-only", hint="set TRIVISOR_HOME to a writable folder")


@dataclass(frozen=True)
class MachineDir:
    """The files of one machine, all in one folder that its row names before it is made."""

    root: Path

    @functools.cached_property
    def alive(self) -> Path:
        """Locked (flock) by the keeper for as long as the machine lives."""
        return self.root / "alive"

    @functools.cached_property
    def lock(self) -> Path:
        """Locked (flock) by the process that carries out an operation, and names it."""
        return self.root / "lock"

    @functools.cached_property
    def line(self) -> Path:
        """The keeper's unix socket."""
        return self.root / "line.sock"

    @functools.cached_property
    def answer(self) -> Path:
        """The socket at which owners of handlers attach (container)."""
        return self.root / "answer.sock"

    @functools.cached_property
    def qmp(self) -> Path:
        return self.root / "qmp.sock"

    @functools.cached_property
    def net(self) -> Path:
        """The socket of the network's helper, at which its owner changes ports and rules."""
        return self.root / "net.sock"

    @functools.cached_property
    def keeper(self) -> Path:
        """ "PID STARTTIME" of the keeper."""
        return self.root / "keeper"

    @functools.cached_property
    def exit(self) -> Path:
        """How the last life ended, written aside and renamed by the keeper."""
        return self.root / "exit"

    @functools.cached_property
    def disk(self) -> Path:
        return self.root / "disk.qcow2"

    @functools.cached_property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, name: str) -> Path:
        """`name` is serial, init, engine, answer or egress."""
        return self.logs / f"{name}.log"


@functools.lru_cache(maxsize=1024)
def _machine_dir(home: Path, machine_id: str) -> MachineDir:
    """One object for a machine: an operation asks for its paths some fifty times."""
    return MachineDir(home / "machines" / machine_id)
