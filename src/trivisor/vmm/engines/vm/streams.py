"""A machine's memory and disk on their way from one QEMU to another, over QMP.

Neither QEMU reaches any network: each has one end of a socket pair for memory, and one for the disk; what lies between is vmm/migration.

disk    the source mirrors its writable layer into an NBD export of the target's, which is its empty disk. Once they are equal each
        write goes to both (write-blocking), so nothing is left to copy however much the guest writes.
memory  QEMU's precopy migration: all of it, then what was written since, until the rest is sent in the time that the guest may stand
        still. There the source stops before it gives its devices away (pause-before-switchover): the mirror is ended first.

Before 9.0, QEMU's translator (TCG) loses track of what a guest writes while its memory is sent: what arrives is damaged, now and then.
There the guest stands still for all of that (`live`).

Every call connects anew, since QEMU has one client at a time and others ask it things meanwhile. What went wrong ends in `abandon`: the
source runs on as if nothing had been.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from trivisor.core.errors import EngineError
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import frozen
from trivisor.vmm.engines.vm.qmp import Qmp

_NODE, _AWAY, _EXPORT = "upper", "away", "upper"
_OPEN = 20.0
"""Seconds for the two QEMUs to agree about the disk, in which the source's guest may stand still."""
_END = 10.0
_UNBOUND = 1 << 40
_TRACKS = 9
_CAPABILITIES = {"pause-before-switchover": True, "events": True}
_STEP = 0.2
_RUNNING = ("setup", "active", "wait-unplug", "device", "pre-switchover")


@dataclass(frozen=True)
class Precopy:
    """How far memory is. Bytes, bytes a second, seconds."""

    status: str
    sent: int = 0
    remaining: int = 0
    total: int = 0
    rate: float = 0.0
    dirty: float = 0.0
    expected: float = 0.0
    rounds: int = 0
    why: str = ""

    @property
    def ready(self) -> bool:
        """The guest stands still, and waits for its disk."""
        return self.status == "pre-switchover"


class Source:
    """The QEMU of a machine that is to leave."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def live(self) -> bool:
        """Whether it may run while its memory is sent."""
        known = frozen.life(self._box.dir, self._box.spec.name)
        return known.shape.accel != "tcg" or int(known.needs.get("qemu", "0").partition(".")[0]) >= _TRACKS

    def halt(self) -> None:
        """Have it stand still. Raises EngineError."""
        with self._qmp() as qmp:
            qmp.ask("stop")

    def mirror(self, nbd: int) -> None:
        """Begin to copy the disk to the export behind the connected socket `nbd`. Raises EngineError."""
        with self._qmp() as qmp:
            _clear(qmp)  # what was abandoned by one who had no answer in time
            qmp.ask("getfd", {"fdname": _AWAY}, fd=nbd)
            target = {"driver": "nbd", "node-name": _AWAY, "export": _EXPORT, "discard": "unmap", "detect-zeroes": "unmap"}
            qmp.ask("blockdev-add", {**target, "server": {"type": "fd", "str": _AWAY}}, timeout=_OPEN)
            mirror = {"job-id": _AWAY, "device": _NODE, "target": _AWAY, "sync": "full", "copy-mode": "write-blocking"}
            qmp.ask("blockdev-mirror", {**mirror, "auto-dismiss": False, "on-target-error": "report"}, timeout=_OPEN)

    def mirrored(self) -> tuple[int, int, bool]:
        """Return the bytes of the disk that were copied, how many there are, and whether both are equal now. Raises EngineError."""
        with self._qmp() as qmp:
            job = _job(qmp)
        if job is None or job["status"] == "concluded":
            raise EngineError("the disk was not copied", output=str((job or {}).get("error", "")), machine=self._box.spec.name)
        return int(job["current-progress"]), int(job["total-progress"]), job["status"] == "ready"

    def send(self, memory: int, *, downtime: float, rate: int | None, throttle: bool) -> None:
        """Begin to send memory into the socket `memory`; `rate` is bytes a second at most. Raises EngineError."""
        with self._qmp() as qmp:
            _capabilities(qmp, {**_CAPABILITIES, "auto-converge": throttle})
            parameters = {"downtime-limit": max(1, round(downtime * 1000)), "max-bandwidth": rate or _UNBOUND}
            qmp.ask("migrate-set-parameters", parameters)
            qmp.ask("getfd", {"fdname": "memory"}, fd=memory)
            qmp.ask("migrate", {"uri": "fd:memory"})

    def sending(self) -> Precopy:
        """Return how far memory is, at the latest after a moment, at once where the guest stands still. Raises EngineError."""
        with self._qmp() as qmp:
            seen = _precopy(qmp)
            if seen.status in ("setup", "active"):
                qmp.wait_event("MIGRATION", lambda data: data.get("status") not in ("setup", "active"), _STEP)
                seen = _precopy(qmp)
            return seen

    def looked(self) -> Precopy:
        """Return how far memory is, at once. Raises EngineError."""
        with self._qmp() as qmp:
            return _precopy(qmp)

    def part(self, *, mirrored: bool) -> None:
        """End the mirror, when the guest stands still: the target's disk is whole then. Raises EngineError."""
        if not mirrored:
            return
        with self._qmp() as qmp:
            qmp.ask("block-job-cancel", {"device": _AWAY, "force": False})
            job = _concluded(qmp, _END)
            qmp.ask("job-dismiss", {"id": _AWAY})
            if job.get("error"):
                raise EngineError("the rest of the disk was not copied", output=str(job["error"]), machine=self._box.spec.name)
            qmp.ask("blockdev-del", {"node-name": _AWAY})

    def finish(self, timeout: float) -> None:
        """Send the rest: the devices. The machine stands still from here on. Raises EngineError."""
        with self._qmp() as qmp:
            qmp.ask("migrate-continue", {"state": "pre-switchover"})
            deadline = time.monotonic() + timeout
            while (seen := _precopy(qmp)).status in ("device", "pre-switchover", "active"):
                if time.monotonic() > deadline:
                    raise EngineError(f"QEMU did not send the machine's devices in {timeout:g} s", machine=self._box.spec.name)
                time.sleep(0.001)  # its event may have come to whoever was connected before
            if seen.status != "completed":
                raise EngineError("QEMU did not send the machine's devices", output=seen.why, machine=self._box.spec.name)

    def abandon(self) -> None:
        """Have the machine run on as if nothing had been, wherever it was. Raises EngineError."""
        with self._qmp() as qmp:
            if _precopy(qmp).status in _RUNNING:
                qmp.ask("migrate_cancel")
                deadline = time.monotonic() + _END
                while _precopy(qmp).status in (*_RUNNING, "cancelling") and time.monotonic() < deadline:
                    time.sleep(0.002)
            _clear(qmp)
            with suppress(EngineError):  # a later one sets its own
                _capabilities(qmp, dict.fromkeys((*_CAPABILITIES, "auto-converge"), False))
            if not qmp.ask("query-status")["running"]:
                qmp.ask("cont")

    @contextmanager
    def _qmp(self) -> Iterator[Qmp]:
        with Qmp.connect(self._box.dir.qmp, self._box.spec.name) as qmp:
            yield qmp


class Target:
    """The QEMU that waits for a machine."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def export(self, listener: int) -> None:
        """Offer the empty disk to one who connects to the listening socket `listener`. Raises EngineError."""
        with self._qmp() as qmp:
            qmp.ask("getfd", {"fdname": "disk"}, fd=listener)
            qmp.ask("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "disk"}}, "max-connections": 1})
            export = {"type": "nbd", "id": _EXPORT, "node-name": _NODE, "name": _EXPORT, "writable": True}
            qmp.ask("block-export-add", export)

    def take(self, memory: int) -> None:
        """Begin to read memory and devices from the socket `memory`. Raises EngineError."""
        with self._qmp() as qmp:
            _capabilities(qmp, {"late-block-activate": True})
            qmp.ask("getfd", {"fdname": "memory"}, fd=memory)
            qmp.ask("migrate-incoming", {"uri": "fd:memory"})

    def taken(self) -> bool:
        """Return whether all has come. Raises EngineError if what came is no machine."""
        with self._qmp() as qmp:
            seen = _precopy(qmp)
            if seen.status in ("failed", "cancelled"):
                raise EngineError("QEMU did not take the machine", output=seen.why, machine=self._box.spec.name)
            return seen.status == "completed" and qmp.ask("query-status")["status"] not in ("inmigrate", "finish-migrate")

    def detach(self, *, exported: bool) -> None:
        """Take the disk back from whoever wrote to it. Raises EngineError."""
        if exported:
            with self._qmp() as qmp:
                qmp.ask("nbd-server-stop")

    def go(self) -> None:
        """Let the machine run. Raises EngineError."""
        with self._qmp() as qmp:
            qmp.ask("cont")

    @contextmanager
    def _qmp(self) -> Iterator[Qmp]:
        with Qmp.connect(self._box.dir.qmp, self._box.spec.name) as qmp:
            yield qmp


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends: ours, and QEMU's, to be closed when QEMU has it."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def _capabilities(qmp: Qmp, wanted: dict[str, bool]) -> None:
    states = [{"capability": name, "state": state} for name, state in wanted.items()]
    qmp.ask("migrate-set-capabilities", {"capabilities": states})


def _clear(qmp: Qmp) -> None:
    """Take away what is left of a mirror."""
    if (job := _job(qmp)) is not None:
        if job["status"] != "concluded":
            with suppress(EngineError):  # it may be ending by itself, since what it writes to has gone
                qmp.ask("block-job-cancel", {"device": _AWAY, "force": True})
            _concluded(qmp, _END)
        qmp.ask("job-dismiss", {"id": _AWAY})
    if any(node["node-name"] == _AWAY for node in qmp.ask("query-named-block-nodes", {"flat": True})):
        qmp.ask("blockdev-del", {"node-name": _AWAY})


def _job(qmp: Qmp) -> dict[str, Any] | None:
    return next((job for job in qmp.ask("query-jobs") if job.get("id") == _AWAY), None)


def _concluded(qmp: Qmp, timeout: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while (job := _job(qmp)) is not None and job["status"] != "concluded":
        if time.monotonic() > deadline:
            raise EngineError(f"QEMU did not end the copying of the disk in {timeout:g} s")
        time.sleep(0.001)
    return job or {}


def _precopy(qmp: Qmp) -> Precopy:
    said: dict[str, Any] = qmp.ask("query-migrate")
    ram: dict[str, Any] = said.get("ram") or {}
    page = int(ram.get("page-size", 4096))
    return Precopy(
        status=str(said.get("status", "none")),
        sent=int(ram.get("transferred", 0)),
        remaining=int(ram.get("remaining", 0)),
        total=int(ram.get("total", 0)),
        rate=float(ram.get("mbps", 0)) * 1e6 / 8,
        dirty=float(ram.get("dirty-pages-rate", 0)) * page,
        expected=float(said.get("expected-downtime", 0)) / 1000,
        rounds=int(ram.get("dirty-sync-count", 0)),
        why=str(said.get("error-desc", "")),
    )
