"""What a machine wrote, packed as an image's layer out of its writable layer (images/upper.py).

The machine stands still meanwhile. A virtual machine's disk is read by its engine, which hands over a list of what lies there. Of a
container or gVisor: as root its files are read here; a disk of its own size is mounted in a mount namespace that
ends with the reader; without root the reader is root of a user namespace, who alone may read files of the machine's other users.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import msgspec

from trivisor.core import process
from trivisor.core.errors import InvalidSpec, StorageError
from trivisor.images import upper
from trivisor.images.limits import DEFAULT
from trivisor.images.pack import PackedLayer
from trivisor.images.stream import Section
from trivisor.images.upper import Request
from trivisor.images.written import Received
from trivisor.launch import ids, loop
from trivisor.vmm import layers
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.container import freezing

FURNISHED = ("etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id", ".trivisor")
"""What the machine is given at its start, and is none of its image's."""
_TIMEOUT = 1800.0
_MOUNT = 'mount -t ext4 "$1" "$2" && shift 2 && exec "$@"'
"""Not read-only: one file system is mounted in one way, and the machine's own mount may be there still."""


@runtime_checkable
class Reader(Protocol):
    """An engine that lists what a machine of it wrote (images/written.py): the host looks at no disk of a guest's."""

    def written(self, box: Box, into: BinaryIO) -> None: ...


def pack_folder(
    folder: Path, lowers: Sequence[Path], target: Path, *, without: Sequence[str] = (), latest: int | None = None
) -> PackedLayer:
    """Write the layer that a folder, as overlayfs leaves it with the ids that a machine sees, is over `lowers`. Raises as `pack` does."""
    left_out = [*FURNISHED, *without]
    if os.geteuid() == 0:
        return upper.pack(folder, lowers, target, without=left_out, latest=latest)
    request = target.with_suffix(".request")
    _ask(request, Request(str(folder), [str(lower) for lower in lowers], str(target), None, None, left_out, latest))
    ids.run_as_root([sys.executable, "-m", "trivisor.images.upper", str(request)], _TIMEOUT)
    return PackedLayer(target, *msgspec.json.decode(request.with_suffix(".answer").read_bytes(), type=tuple[str, str, int]))


def pack(box: Box, target: Path, *, without: tuple[str, ...] = (), latest: int | None = None) -> PackedLayer:
    """Write the layer to the new file `target`. Raises InvalidSpec, ImageError, StorageError, EngineError, HostLacks."""
    _check(box)
    place = layers.layers(box)[0]
    assert isinstance(place.upper, Path)
    shape = layers.shape(box)
    own = shape.ids(box.slot)
    lowers = list(box.lowers)
    left_out = [*FURNISHED, *without]
    if layers.below(box) is not None:
        # What it was made from is its own as well.
        work = target.with_suffix(".whole")
        work.mkdir()
        freezing.whole(box, shape, work)
        return pack_folder(work / freezing.LAYER, lowers, target, without=without, latest=latest)
    if shape.kind in ("own", "same") and not layers.sized(box.spec):
        return upper.pack(place.upper / "upper", lowers, target, users=own.users, groups=own.groups, without=left_out, latest=latest)
    request, names = target.with_suffix(".request"), [str(lower) for lower in lowers]
    program = [sys.executable, "-m", "trivisor.images.upper", str(request)]
    if layers.sized(box.spec):
        mounted = target.with_suffix(".mounted")
        mounted.mkdir()
        inside = mounted / place.upper.relative_to(box.dir.root / "layers") / "upper"
        _ask(request, Request(str(inside), names, str(target), list(own.users), list(own.groups), left_out, latest))
        with loop.attached(layers.disk_file(box)) as device:
            process.run(
                [process.find("unshare", "util-linux"), "--mount", "sh", "-c", _MOUNT, "sh", device, mounted, *program], timeout=_TIMEOUT
            )
    else:
        _ask(request, Request(str(place.upper / "upper"), names, str(target), None, None, left_out, latest))
        ids.run_as_root(program, _TIMEOUT)
    diff_id, digest, size = msgspec.json.decode(request.with_suffix(".answer").read_bytes(), type=tuple[str, str, int])
    return PackedLayer(target, diff_id, digest, size)


def read(
    engine: Reader,
    box: Box,
    lowers: Callable[[], Sequence[Path]],
    target: Path,
    *,
    without: tuple[str, ...] = (),
    latest: int | None = None,
) -> PackedLayer:
    """Write the layer of a machine whose engine reads its disk. `lowers` is asked if what lies below is needed.

    Raises what `pack` raises, and GuestError.
    """
    _check(box)
    spool = target.with_suffix(".written")
    try:
        with spool.open("x+b") as file:
            engine.written(box, file)
            stream = Section(file.fileno(), 0, file.seek(0, os.SEEK_END), f"disk of {box.spec.name}")
            listing = Received(stream, DEFAULT)
            return upper.pack(listing, lowers, target, without=[*FURNISHED, *without], latest=latest)
    except OSError as error:
        raise StorageError(f"{spool} cannot be written: {error.strerror}") from error
    finally:
        spool.unlink(missing_ok=True)


def _check(box: Box) -> None:
    if box.spec.disk == "ram":
        raise InvalidSpec("what it wrote is in its memory alone", machine=box.spec.name, hint='make it without disk="ram"')


def _ask(request: Path, asked: Request) -> None:
    try:
        request.write_bytes(msgspec.json.encode(asked))
    except OSError as error:
        raise StorageError(f"{request} cannot be written: {error.strerror}") from error
