"""The writable layer made larger: its qcow2 by QEMU, over QMP, and the ext4 in it by the guest, while it is used.

The host touches neither itself, since a guest wrote both. So a disk of a machine that does not run grows at its next start, before any
program runs. What the file has is in its header, what it is to have in the spec; a mark beside it stands from before the one until the
guest has followed, so that a growth that was cut short is taken up by the next start.
"""

from __future__ import annotations

from pathlib import Path

from trivisor.core.errors import StorageError
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import disks, files, making
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vos import guest
from trivisor.vos.line import Line

_NODE = "upper"
_RESIZE = 30.0


def live(box: Box, size: int, timeout: float) -> None:
    """Make the disk of a running machine `size` bytes. Raises EngineError, GuestError if the guest does not follow."""
    _mark(box)
    steps = _grow(box, size)
    line = Line.connect(box.dir.line, box.spec.name)
    try:
        guest.configure(line, steps, timeout=timeout)
    finally:
        line.close()
    done(box)


def steps(box: Box) -> list[tuple[str, ...]]:
    """At a start, when the guest has answered: make the file what the spec says, and return what the guest does for that."""
    if box.spec.disk == "ram":
        return []
    size = disks.size(box.dir.disk)
    return _grow(box, max(size, box.spec.disk)) if _marked(box).exists() or size < disks.rounded(box.spec.disk) else []


def done(box: Box) -> None:
    """The guest has followed."""
    try:
        _marked(box).unlink(missing_ok=True)
    except OSError as error:
        raise files.storage(error, "writing the machine's folder") from error


def _grow(box: Box, size: int) -> list[tuple[str, ...]]:
    size = disks.rounded(size)
    with Qmp.connect(box.dir.qmp, box.spec.name) as qmp:
        qmp.ask("block_resize", {"node-name": _NODE, "size": size}, timeout=_RESIZE)
    return [("grow", making.UPPER_DISK, str(size))]


def _mark(box: Box) -> None:
    try:
        _marked(box).touch()
    except OSError as error:
        raise StorageError(f"{box.dir.root} cannot be written: {error.strerror}", machine=box.spec.name) from error


def _marked(box: Box) -> Path:
    return box.dir.root / "growing"
