"""What container and gvisor lay over an image's unpacked root: one writable layer a folder, kept while the machine is stopped.

A layer is a folder of what the machine's programs changed (overlayfs, "Upper and Lower"), with disk="ram" a tmpfs of
half the machine's memory, as Linux gives a tmpfs by default. Where a size was asked for, the folders lie in an ext4 of that
size in a sparse file: the host alone writes its blocks, tvinit mounts it in the machine's namespaces, and mount and loop device end with
those. Its files belong to the ids that the machine has outside, so
a host that gives other ids than when it was made cannot run it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trivisor.core import process
from trivisor.core.errors import EngineError, HostLacks, StorageError
from trivisor.core.spec import Spec
from trivisor.core.units import MIB
from trivisor.launch import ext4, ids, loop
from trivisor.launch.container import Layer
from trivisor.launch.ids import Shape
from trivisor.launch.jail import Bind
from trivisor.vmm.engine import Box

BELOW = "below"
_JOURNAL = 1024 * MIB
"""From this size on mkfs.ext4 would take a journal larger than 32 MiB, for no gain."""


def layers(box: Box) -> list[Layer]:
    """Return the machine's layers: the first is of the root, the others of the host's folders in it."""
    place = box.dir.root / "layers"
    ram = box.spec.disk == "ram"
    lower, names = _stack(box.lowers)
    lowers = [(lower, "/", names), *((folder, str(folder), ()) for folder in box.host_folders)]
    found = [
        Layer(lower, box.spec.memory // 2 if ram else place / (target.strip("/") or "root"), target, names=names)
        for lower, target, names in lowers
    ]
    return [replace(found[0], above=above), *found[1:]] if (above := below(box)) is not None else found


def below(box: Box) -> Path | None:
    """Return the frozen layer over which the machine's own lies (engines/container/freezing.py), if there is one."""
    try:
        return Path(os.readlink(box.dir.root / "layers" / BELOW))  # noqa: PTH115 - most have none, and this is asked often
    except OSError:
        return None


def _stack(lowers: tuple[Path, ...]) -> tuple[Path, tuple[str, ...]]:
    """Return several folders as a launch plan names them: the one that holds them, and their names in it."""
    if len(lowers) == 1:
        return lowers[0], ()
    above = Path(os.path.commonpath(lowers))
    return above, tuple(str(lower.relative_to(above)) for lower in lowers)


def shape(box: Box) -> Shape:
    """Return the ids that the machine can have: those that all file systems it shows allow, of which the home's is only one where
    the root is the host's. Raises HostLacks."""
    places = {place.stat().st_dev: place for place in (*box.host_folders, box.home.root)}
    return max((ids.probe(place) for place in places.values()), key=lambda found: ids.KINDS.index(found.kind))


@contextmanager
def ready(box: Box) -> Iterator[list[Layer]]:
    """Give the layers as a plan needs them; a disk's loop device is there until the `with` ends or the machine, whichever is later.

    Raises StorageError.
    """
    found = layers(box)
    if not sized(box.spec):
        yield found
        return
    place = box.dir.root / "layers"
    assert isinstance(box.spec.disk, int)
    if ext4.size(disk_file(box)) < box.spec.disk // ext4.BLOCK * ext4.BLOCK:
        grow(box, box.spec.disk, live=False)
    with loop.attached(disk_file(box)) as device:
        # Within the disk they lie as they do within the folder that it was made from.
        yield [replace(layer, upper="/" / Path(str(layer.upper)).relative_to(place), device=device) for layer in found]


def grow(box: Box, size: int, *, live: bool) -> None:
    """Make the disk of a machine `size` bytes; `live`: of one that runs, where `ext4.able`. Raises HostLacks, StorageError."""
    file = disk_file(box)
    size = size // ext4.BLOCK * ext4.BLOCK
    try:
        if file.stat().st_size < size:
            os.truncate(file, size)
    except OSError as error:
        hint = "the home's file system must take files of that size"
        raise StorageError(f"{file} cannot be made larger: {error.strerror}", machine=box.spec.name, hint=hint) from error
    if not live:
        ext4.grow_file(file, size)
        return
    with loop.attached(file) as device:
        ext4.grow(device, size)


def volatile(spec: Spec) -> bool:
    """Whether what is written need not survive the host, so that nothing is waited for. Not on a disk of its own, where overlayfs's mark
    of it would bar the next start."""
    return spec.disk == "ram" or (spec.lifetime == "process" and not sized(spec))


def possible(spec: Spec) -> None:
    """Raise HostLacks if a disk of the size that was asked for cannot be enforced here."""
    if sized(spec):
        try:
            loop.check()
            process.find("mkfs.ext4", "e2fsprogs")
        except HostLacks as error:
            hint = f"{error.hint}; or leave out disk: then the file system of the home alone is the bound"
            raise HostLacks(f"the size of its disk cannot be enforced on this host: {error}", hint=hint) from error


def disk_sizes() -> tuple[bool, str]:
    """Return whether the size of a disk is enforced on this host when asked for, and that in words, for doctor."""
    try:
        loop.check()
        process.find("mkfs.ext4", "e2fsprogs")
    except HostLacks as error:
        return False, f"its size cannot be enforced: {error}; the file system of the home is the bound"
    return True, "its size is enforced when asked for (ext4 in a file); else the file system of the home is the bound"


def sized(spec: Spec) -> bool:
    return "disk" in spec.asked and spec.disk != "ram"


def disk_file(box: Box) -> Path:
    return box.dir.root / "layers.ext4"


def make(box: Box, owner: tuple[int, int]) -> None:
    """Make the machine's layers, of which `owner` is root of the machine. Raises StorageError."""
    for layer in layers(box):
        if isinstance(layer.upper, Path):
            _make(layer.upper, layer.lower if box.host_root and layer.target != "/" else None, owner)
    if sized(box.spec):
        make_disk(box, disk_file(box), box.dir.root / "layers")


def make_over(box: Box, place: Path, frozen: Path, owner: tuple[int, int]) -> None:
    """Make in the new folder `place` what `layers` is of a machine: an empty layer, over the one in `frozen`. Raises StorageError."""
    _make(place / "root", frozen, owner)
    try:
        (place / BELOW).symlink_to(frozen)
    except OSError as error:
        raise StorageError(f"{place} cannot be made: {error.strerror}", machine=box.spec.name, hint="free space under the home") from error


def check(box: Box, shape: Shape) -> None:
    """See to it that the layers can be mounted. Raises StorageError if one is gone, EngineError if it is of other ids."""
    owner = shape.ids(box.slot).owner
    for layer in layers(box):
        if not isinstance(layer.upper, Path):
            continue
        try:
            if sized(box.spec):
                disk_file(box).stat()
            found = (layer.upper / "upper").stat()
        except OSError as error:
            raise StorageError(f"the writable layer {layer.upper} is gone: {error.strerror}", machine=box.spec.name) from error
        if (found.st_uid, found.st_gid) != owner:
            raise EngineError(
                f"its writable layer belongs to user {found.st_uid}, and would be run as {owner[0]}",
                machine=box.spec.name,
                hint="this host gives other ids than when it was made (see `trivisor doctor`); make a new machine",
            )
        if volatile(box.spec):
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


def make_disk(box: Box, file: Path, content: Path) -> None:
    """Make the disk, with a copy of the layers in `content` in it. If they are empty some 5 ms and 200 KB, whatever its size."""
    assert isinstance(box.spec.disk, int)
    options = ["-q", "-F", "-b", str(ext4.BLOCK), "-m", "0", "-G", "64", "-O", "^resize_inode"]
    options += ["-E", "nodiscard,assume_storage_prezeroed=1,lazy_itable_init=0,lazy_journal_init=1"]
    if box.spec.disk >= _JOURNAL:
        options += ["-J", "size=32"]
    try:
        with file.open("xb") as stream:
            stream.truncate(box.spec.disk)
    except OSError as error:
        hint = "free space under the home; its file system must take files of that size"
        raise StorageError(f"{file} cannot be made: {error.strerror}", hint=hint) from error
    process.run([process.find("mkfs.ext4", "e2fsprogs"), *options, "-d", content, file], timeout=120)
