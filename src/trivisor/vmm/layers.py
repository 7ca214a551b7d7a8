"""What container and gvisor lay over an image's unpacked root: one writable layer a folder, kept while the machine is stopped.

A layer is a folder of what the machine's programs changed (overlayfs, "Upper and Lower"), with disk="ram" a tmpfs of
half the machine's memory, as Linux gives a tmpfs by default. Its files belong to the ids that the machine has outside, so
a host that gives other ids than when it was made cannot run it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.spec import Spec
from trivisor.launch import ids
from trivisor.launch.container import Layer
from trivisor.launch.ids import Shape
from trivisor.launch.jail import Bind
from trivisor.vmm.engine import Box


def layers(box: Box) -> list[Layer]:
    """Return the machine's layers: the first is of the root, the others of the host's folders in it."""
    place = box.dir.root / "layers"
    ram = box.spec.disk == "ram"
    lowers = [(box.tree, "/"), *((folder, str(folder)) for folder in box.host_folders)]
    return [Layer(lower, box.spec.memory // 2 if ram else place / (target.strip("/") or "root"), target) for lower, target in lowers]


def make(box: Box, owner: tuple[int, int]) -> None:
    """Make the machine's layers, of which `owner` is root of the machine. Raises StorageError."""
    for layer in layers(box):
        if isinstance(layer.upper, Path):
            _make(layer.upper, layer.lower if box.host_root and layer.target != "/" else None, owner)


def check(box: Box, shape: Shape) -> None:
    """See to it that the layers can be mounted. Raises StorageError if one is gone, EngineError if it is of other ids."""
    owner = shape.ids(box.slot).owner
    for layer in layers(box):
        if not isinstance(layer.upper, Path):
            continue
        try:
            found = (layer.upper / "upper").stat()
        except OSError as error:
            raise StorageError(f"the writable layer {layer.upper} is gone: {error.strerror}", machine=box.spec.name) from error
        if (found.st_uid, found.st_gid) != owner:
            raise EngineError(
                f"its writable layer belongs to user {found.st_uid}, and would be run as {owner[0]}",
                machine=box.spec.name,
                hint="this host gives other ids than when it was made (see `trivisor doctor`); make a new machine",
            )
        if box.spec.lifetime == "process":
            _clear_mark(layer.upper / "work" / "work")


def _clear_mark(work: Path) -> None:
    """Remove overlayfs's mark on a layer that was mounted volatile: it refuses it a second time, lest the host crashed in
    between. But then the process that such a machine belongs to would have ended too."""
    try:
        if os.geteuid() == 0:
            shutil.rmtree(work / "incompat")
        elif work.exists():
            ids.remove_tree(work)  # the kernel makes it closed to everybody, and makes it anew
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"{work} cannot be cleared: {error.strerror}") from error


def volumes(spec: Spec) -> list[Bind]:
    """Return the host's folders that the machine shares. Programs in them can be run; no device in them works."""
    mode = {True: "ro,exec,straight", False: "rw,exec,straight"}
    return [Bind(Path(volume.source), target, mode[volume.readonly]) for target, volume in spec.volumes.items()]


def _make(folder: Path, like: Path | None, owner: tuple[int, int]) -> None:
    try:
        folder.mkdir(mode=0o755, parents=True)
        for name, mode in (("upper", 0o755), ("work", 0o700)):
            place = folder / name
            place.mkdir(mode=mode)
            place.chmod(like.stat().st_mode & 0o7777 if like and name == "upper" else mode)
            if owner != (os.geteuid(), os.getegid()):
                os.chown(place, *owner)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}", hint="free space under the home") from error
