"""What the verbs share: the home, its records, its images, and the engines by wall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from trivisor.core.errors import NotFound, UnsupportedByWall
from trivisor.core.paths import Home, MachineDir
from trivisor.core.spec import PASSING, Wall
from trivisor.images import host
from trivisor.images.catalog import Images
from trivisor.images.disks.catalog import Catalog
from trivisor.vmm.engine import Box, Engine
from trivisor.vmm.guestline import Lines
from trivisor.vmm.records import Records, Row
from trivisor.vmm.shares import folders
from trivisor.vos.devices.service import Server
from trivisor.vos.syscalls.service import Held
from trivisor.vos.syscalls.supervisor import Supervisor


@dataclass(frozen=True)
class Context:
    """One home as one process has it open."""

    home: Home
    records: Records
    images: Images
    disks: Catalog
    engines: Mapping[Wall, Engine]
    lines: Lines = field(default_factory=Lines)
    _held: dict[str, Held] = field(default_factory=dict)
    _supervisors: dict[str, Supervisor] = field(default_factory=dict)
    _servers: dict[str, dict[str, Server]] = field(default_factory=dict)

    def engine(self, wall: Wall, machine: str = "") -> Engine:
        """Return the engine of `wall`. Raises UnsupportedByWall where this version has none."""
        engine = self.engines.get(wall)
        if engine is None:
            raise UnsupportedByWall("run machines in this version of Trivisor", wall, self.engines, machine=machine)
        return engine

    def held(self, machine: str) -> Held:
        """Return what this process holds of a machine's system calls."""
        return self._held.setdefault(machine, Held())

    def supervisor(self, machine: str, name: str) -> Supervisor:
        """Return what runs this process's handlers for a machine."""
        return self._supervisors.setdefault(machine, Supervisor(name))

    def servers(self, machine: str) -> dict[str, Server]:
        """Return what answers in this process for a machine's devices, by name."""
        return self._servers.setdefault(machine, {})

    def forget(self, machine: str) -> None:
        """Let go of a machine that is gone, or is left to others: its line, and what answered its programs' calls."""
        self.lines.drop(machine)
        self._held.pop(machine, None)
        for server in self._servers.pop(machine, {}).values():
            server.close()
        supervisor = self._supervisors.pop(machine, None)
        if supervisor is not None:
            supervisor.close()

    def close(self) -> None:
        """Let go of all machines."""
        for machine in {*self._supervisors, *self._servers}:
            self.forget(machine)
        self.lines.close()

    def row(self, machine: str) -> Row:
        """Return the record of the machine with this id, as it stands. Raises NotFound."""
        row = self.records.row(machine)
        if row is None:
            raise NotFound(f"machine {machine} is gone", machine=machine, hint="it was deleted; `trivisor ps` lists those there are")
        return row

    def folder(self, row: Row) -> MachineDir:
        return self.home.machine(row.id)

    def box(self, row: Row) -> Box:
        """Return what the engine is told about a machine."""
        rootfs, key = self.images.root_path(row.digest, passing=PASSING in row.spec.labels)
        return Box(
            id=row.id,
            spec=msgspec.structs.replace(row.spec, volumes=folders(self.home, row.spec.volumes)),
            home=self.home,
            dir=self.folder(row),
            rootfs=rootfs,
            rootfs_digest=key,
            slot=row.slot,
            lowers=self.images.lower_paths(row.digest),
            host_folders=host.folders(hidden=self.home.root) if row.digest.startswith(host.PREFIX) else (),
            owner=row.owner.pid if row.owner else None,
        )


def pin_owner(machine: str) -> str:
    """Return the name under which a machine holds its image in the store."""
    return f"machine:{machine}"
