"""A copy of the writable layer of a machine that runs, as it is at one instant: before, take, after, in that order.

Where the file system shares blocks between files, or the layer is small, it is copied while the machine stands still. Else QEMU does it
when the machine runs again, and saves what the guest is about to overwrite before it does (blockdev-backup). QEMU is given the copy's
descriptor and can reach nothing else by it; the copy is a file without a backing file like the one that it is a copy of.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trivisor.core.errors import EngineError, StorageError
from trivisor.core.process import find, run
from trivisor.core.units import MIB
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import disks, files
from trivisor.vmm.engines.vm.qmp import Qmp

SMALL = 48 * MIB
"""Bytes on the host's disk, up to which a layer is copied at once: some 30 ms."""
_FICLONE = 0x40049409
_NAME = "frozen"
_COPYING = 3600.0


class Copy:
    """The copy of a machine's layer at `target`. Raises OSError where nothing else is said."""

    def __init__(self, box: Box, qmp: Qmp, target: Path, *, beside: bool) -> None:
        self._box = box
        self._qmp = qmp
        self._target = target
        self._beside = beside
        self._source = os.open(box.dir.disk, os.O_RDONLY | os.O_CLOEXEC)
        self._set: int | None = None
        self._job = False

    def before(self) -> None:
        """While the machine runs. What it wrote is on the disk already when it is stopped, which waits for that."""
        tidy(self._qmp)
        if not self._beside:
            os.fdatasync(self._source)
            return
        size = str(disks.size(self._box.dir.disk))
        run([find("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", self._target, size], timeout=60)
        fd = os.open(self._target, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._set = int(self._qmp.ask("add-fd", {}, fd=fd)["fdset-id"])
        finally:
            os.close(fd)
        file = {"driver": "file", "filename": f"/dev/fdset/{self._set}", "locking": "off"}
        self._qmp.ask("blockdev-add", {"driver": "qcow2", "node-name": _NAME, "file": file, "discard": "unmap"})

    def take(self) -> None:
        """While it stands still. Raises EngineError."""
        if self._beside:
            self._qmp.ask("blockdev-backup", {"job-id": _NAME, "device": "upper", "target": _NAME, "sync": "top"})
            self._job = True
            return
        with self._target.open("xb") as stream:
            if not _reflink(self._source, stream.fileno()):
                files.copy_sparse(self._source, stream.fileno())

    def after(self) -> None:
        """When it may run again. Raises EngineError, StorageError."""
        if not self._job:
            return
        failed: list[str] = []

        def over(data: dict[str, object]) -> bool:
            if data.get("device") == _NAME:
                failed.extend(str(data[key]) for key in ("error",) if key in data)
                return True
            return False

        if not self._qmp.wait_event("BLOCK_JOB_COMPLETED", over, _COPYING):
            raise EngineError("QEMU has not copied the machine's disk", machine=self._box.spec.name)
        self._job = False
        if failed:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if "No space" in failed[0]:
                raise files.storage(full, "copying the machine's disk")
            raise StorageError(f"the machine's disk cannot be copied: {failed[0]}", machine=self._box.spec.name)
        self._release()

    def close(self) -> None:
        os.close(self._source)
        with suppress(EngineError):
            self._release()

    def _release(self) -> None:
        """Have QEMU write the rest and let go of the file."""
        if self._set is not None:
            tidy(self._qmp)
            self._qmp.ask("remove-fd", {"fdset-id": self._set})
            self._set = None


@contextmanager
def opened(box: Box, qmp: Qmp, target: Path, *, at_once: bool = False) -> Iterator[Copy]:
    """Return the copy to be made of a running machine's layer; `at_once` however large it is."""
    place = box.dir.disk
    beside = not at_once and place.stat().st_blocks * 512 > SMALL and not _shares_blocks(place, target)
    copy = Copy(box, qmp, target, beside=beside)
    try:
        yield copy
    finally:
        copy.close()


def tidy(qmp: Qmp) -> None:
    """Have QEMU let go of a copy that it makes, or made, for somebody who has died."""
    if any(job["device"] == _NAME for job in qmp.ask("query-block-jobs")):
        with suppress(EngineError):  # it may end by itself just now
            qmp.ask("block-job-cancel", {"device": _NAME, "force": True})
            qmp.wait_event("BLOCK_JOB_CANCELLED", lambda data: data.get("device") == _NAME, 10.0)
    if any(node["node-name"] == _NAME for node in qmp.ask("query-named-block-nodes", {"flat": True})):
        qmp.ask("blockdev-del", {"node-name": _NAME})


def _shares_blocks(source: Path, target: Path) -> bool:
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with target.open("xb") as stream:
            return _reflink(reading, stream.fileno())
    finally:
        os.close(reading)
        target.unlink(missing_ok=True)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            return False
        raise
    return True
