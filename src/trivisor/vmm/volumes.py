"""Named volumes: folders of the home that machines share. They are kept apart from machines and outlive them."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trivisor.core.errors import AlreadyExists, CallerError, NotFound, StorageError
from trivisor.core.paths import Home
from trivisor.core.wishes import volume_name
from trivisor.store import workspace
from trivisor.vmm import removal
from trivisor.vmm.records import Row
from trivisor.vmm.shares import make, place


@dataclass(frozen=True)
class StoredVolume:
    """A named volume. `created` is seconds since the epoch; `machines` are the names of those that have it."""

    name: str
    path: Path
    created: float
    machines: tuple[str, ...]


class Volumes:
    """The named volumes of one home."""

    def __init__(self, home: Home, rows: Callable[[], Iterable[Row]]) -> None:
        self._home = home
        self._rows = rows

    def list(self) -> list[StoredVolume]:
        """Return every volume, by name."""
        users = self._users()
        try:
            names = sorted(entry.name for entry in self._home.volumes.iterdir())
        except FileNotFoundError:
            return []
        return [self._stored(name, users) for name in names]

    def get(self, name: str) -> StoredVolume:
        """Return the volume with that name. Raises NotFound."""
        if not place(self._home, volume_name(name)).is_dir():
            raise NotFound(f"there is no volume {name}", hint="`trivisor volume list` lists those there are")
        return self._stored(name, self._users())

    def create(self, name: str) -> StoredVolume:
        """Make an empty volume. Raises AlreadyExists, InvalidSpec, StorageError."""
        if not make(self._home, volume_name(name)):
            raise AlreadyExists(f"there is a volume {name} already", hint="choose another name")
        return self.get(name)

    def remove(self, name: str) -> None:
        """Remove a volume with all that is in it. Raises NotFound, CallerError if a machine has it, StorageError."""
        stored = self.get(name)
        if stored.machines:
            raise CallerError(f"volume {name} is used by {', '.join(stored.machines)}", hint="delete what uses it first")
        with workspace.workspace(self._home.tmp) as aside:
            try:
                stored.path.rename(aside.path / "volume")
            except FileNotFoundError as error:
                raise NotFound(f"there is no volume {name}", hint="it was removed meanwhile") from error
            except OSError as error:
                raise StorageError(f"{stored.path} cannot be removed: {error.strerror}") from error
            removal.remove_tree(aside.path / "volume")

    def _users(self) -> dict[str, builtins.list[str]]:
        users: dict[str, builtins.list[str]] = {}
        for row in self._rows():
            for volume in row.spec.volumes.values():
                users.setdefault(volume.source, []).append(row.name)
        return users

    def _stored(self, name: str, users: Mapping[str, builtins.list[str]]) -> StoredVolume:
        path = place(self._home, name)
        try:
            created = path.stat().st_ctime
        except OSError as error:
            raise NotFound(f"there is no volume {name}", hint="it was removed meanwhile") from error
        return StoredVolume(name, path, created, tuple(dict.fromkeys(users.get(name, ()))))
