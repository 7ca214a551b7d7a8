"""Ice: a frozen machine in a folder, home.ice/<key>: freeze and clone, whatever it is used for.

    ram         guest RAM, a plain sparse file that clones map privately and read-only
    state       device state without RAM, as QEMU's migration writes it
    disk.qcow2  the writable layer at that moment, where there was one
    ice.json    what it was made from, sizes and digests

Made aside, made durable, and renamed: it is whole or it is not there. Making holds the exclusive lock of its key, so two
processes that need the same ice make one; starting a clone holds the shared one, so nobody removes it meanwhile (once
QEMU has mapped it, it may go). Ice holds a machine's secrets, the kernel's among them: it never leaves its home.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trivisor.core.files import sha256
from trivisor.core.paths import Home
from trivisor.vmm.engine import Progress
from trivisor.vmm.engines.vm import files
from trivisor.vmm.engines.vm.qmp import Qmp

_FORMAT = 2
_MAKING = 300.0
STALE = 30 * 86400.0
"""Seconds after its last use that ice is swept even if it could still be used."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """ice.json. `needs` are files that it is useless without, by path, with their identity at the time."""

    format: int
    key: str
    argv: list[str]
    needs: dict[str, str]
    memory: int
    state_digest: str
    disk_digest: str
    made: float


@dataclass(frozen=True)
class Ice:
    """A whole ice on disk."""

    folder: Path
    facts: Facts

    @property
    def ram(self) -> Path:
        return self.folder / "ram"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.qcow2"


def key(*parts: object) -> str:
    """Return the key of ice that depends on `parts` and on nothing else."""
    return hashlib.sha256(msgspec.json.encode([_FORMAT, *parts])).hexdigest()[:32]


def find(home: Home, name: str) -> Ice | None:
    """Return the ice with this key if it is there and whole; what is damaged is dropped."""
    folder = home.ice / name
    try:
        facts = msgspec.json.decode((folder / "ice.json").read_bytes(), type=Facts)
        found = Ice(folder, facts)
        whole = facts.format == _FORMAT and found.ram.stat().st_size == facts.memory and sha256(found.state) == facts.state_digest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.DecodeError:
        whole = False
    if whole:
        return found
    drop(home, name)
    return None


@contextlib.contextmanager
def using(home: Home, name: str, progress: Progress) -> Iterator[Ice | None]:
    """Find ice and keep it from being removed while a clone of it starts. None if there is none."""
    if not (home.ice / name).exists():
        yield None
        return
    with files.locked(_lock(home, name), lambda: progress("waiting for another process"), timeout=_MAKING, shared=True):
        found = find(home, name)
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(found.folder)
        yield found


@contextlib.contextmanager
def making(home: Home, name: str, progress: Progress) -> Iterator[bool]:
    """Hold the right to make an ice; False if another process made it while we waited."""
    lock = _lock(home, name)
    said = "waiting for another process that prepares the same machine"
    deadline = time.monotonic() + _MAKING
    with contextlib.ExitStack() as stack:
        while True:
            with contextlib.suppress(files.Held):
                stack.enter_context(files.locked(lock, lambda: None, timeout=0))
                break
            # Shared, so that the wait ends with the making and not with the clones that begin right after it.
            with files.locked(lock, lambda: progress(said), timeout=deadline - time.monotonic(), shared=True):
                made = find(home, name) is not None
            if made:
                yield False
                return
        yield find(home, name) is None


def freeze(
    home: Home, name: str, qmp: Qmp, folder: Path, ram: Path, disk: Path | None, *, argv: Sequence[str], needs: dict[str, str]
) -> Ice:
    """Stop the machine behind `qmp` and freeze it. Its RAM is written through to `ram`, a file of ours on the home's file system.

    `folder` is an empty one to make it in. The machine is ended: its RAM file becomes the ice's. Raises EngineError, StorageError.
    """
    qmp.ask("stop")
    frozen = Ice(folder, Facts(format=0, key="", argv=[], needs={}, memory=0, state_digest="", disk_digest="", made=0))
    try:
        with frozen.state.open("wb") as stream:
            qmp.state_to(stream.fileno())
        qmp.quit()
        qmp.wait_closed()
        ram.rename(frozen.ram)
        frozen.ram.chmod(0o444)
        if os.geteuid() == 0:
            os.chown(frozen.ram, 0, 0)
        if disk is not None:
            files.copy_file(disk, frozen.disk)
        facts = Facts(
            format=_FORMAT,
            key=name,
            argv=list(argv),
            needs=needs,
            memory=frozen.ram.stat().st_size,
            state_digest=sha256(frozen.state),
            disk_digest=sha256(frozen.disk) if disk is not None else "",
            made=time.time(),
        )
        (folder / "ice.json").write_bytes(msgspec.json.encode(facts))
        folder.chmod(0o700)
        target = home.ice / name
        shutil.rmtree(target, ignore_errors=True)
        files.settle(folder, target)
    except OSError as error:
        raise files.storage(error, "freezing the machine") from error
    return Ice(target, facts)


def drop(home: Home, name: str) -> None:
    """Remove an ice, aside first. Clones that run keep their RAM: the kernel holds a mapped file."""
    grave = home.tmp / f"{os.getpid()}-0-ice-{os.urandom(4).hex()}"
    try:
        (home.ice / name).rename(grave)
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.storage(error, "removing ice") from error
    shutil.rmtree(grave, ignore_errors=True)


def sweep(home: Home) -> list[str]:
    """Remove ice that nobody can use any more or has used for long, unless it is in use; say what."""
    said = []
    for folder in sorted(home.ice.iterdir()):
        if not folder.is_dir() or (why := _useless(folder)) is None:
            continue
        try:
            with files.locked(_lock(home, folder.name), lambda: None, timeout=0):
                drop(home, folder.name)
                _lock(home, folder.name).unlink(missing_ok=True)
        except files.Held:
            continue
        said.append(f"ice {folder.name[:12]}: removed, {why}")
    return said


def _useless(folder: Path) -> str | None:
    try:
        facts = msgspec.json.decode((folder / "ice.json").read_bytes(), type=Facts)
    except (OSError, msgspec.DecodeError):
        return "it is not whole"
    if facts.format != _FORMAT:
        return "this version cannot use it"
    for path, seen in facts.needs.items():
        if identity(Path(path)) != seen:
            return f"{path} has changed"
    if time.time() - folder.stat().st_mtime > STALE:
        return "it has not been used for a month"
    return None


def identity(path: Path) -> str:
    """Return what changes when the file at `path` does; empty if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns}:{stat.st_size}"


def disk_whole(ice: Ice) -> bool:
    """Tell whether the frozen disk, if there is one, is what was frozen. Apart from `find`, since not every clone needs it."""
    try:
        return not ice.facts.disk_digest or sha256(ice.disk) == ice.facts.disk_digest
    except FileNotFoundError:
        return False


def _lock(home: Home, name: str) -> Path:
    return home.ice / f"{name}.lock"
