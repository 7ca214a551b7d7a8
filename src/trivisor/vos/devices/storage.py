"""A USB stick whose content is a BlockDevice: the bulk-only transport (USB Mass Storage Class, Bulk-Only 1.0) and the SCSI commands that
drivers ask of a disk (SPC-4, SBC-3).

What a command's data stage does not need is answered short, and what it does not take is swallowed, so a command that fails leaves the
transport in step: its status says so, and REQUEST SENSE why. What is no command wrapper at all halts both pipes until the guest
resets, as the class demands. A function of the disk that takes too long is a medium error; what it answers later is dropped, and known by
its turn, which has passed.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NoReturn

from trivisor.core.devices import SECTOR, Served
from trivisor.core.errors import InvalidSpec
from trivisor.vos.devices.block import BlockDevice, exactly
from trivisor.vos.devices.usb import Endpoint, Interface, Setup, UsbDevice
from trivisor.vos.devices.usbredir import Stall

MAX_TRANSFER = 2 << 20
"""Bytes that one command may move; Linux asks for 120 KiB, or 1 MiB at most."""
_IN, _OUT = 0x81, 0x02
_CBW, _CSW = struct.Struct("<IIIBBB"), struct.Struct("<IIIB")
_CBW_SIZE, _CBW_MARK, _CSW_MARK = 31, 0x43425355, 0x53425355
_PASSED, _FAILED, _PHASE = 0, 1, 2
_READS, _WRITES = (0x28, 0x88), (0x2A, 0x8A)
_RESET, _MAX_LUN = (0x21, 0xFF), (0xA1, 0xFE)

Sense = tuple[int, int, int]
"""Key, code, qualifier (SPC-4, 4.5)."""
_NO_SENSE = (0, 0, 0)
_NO_MEDIUM = (2, 0x3A, 0)
_UNREADABLE, _UNWRITABLE = (3, 0x11, 0), (3, 0x0C, 0)
_NO_COMMAND, _OUT_OF_RANGE, _BAD_FIELD = (5, 0x20, 0), (5, 0x21, 0), (5, 0x24, 0)
_PROTECTED, _NO_SPACE = (7, 0x27, 0), (7, 0x27, 7)


class _Refused(Exception):
    """A command ends with `sense`."""

    def __init__(self, sense: Sense) -> None:
        self.sense = sense


class _OutOfStep(Exception):
    """Host and device disagree about a command's data (6.7 of the class's text)."""


@dataclass
class _Command:
    """One command wrapper, and how far its data has come."""

    tag: int
    length: int
    inward: bool
    cdb: bytes
    turn: int
    missing: int = 0
    """Bytes that the guest is still to send."""
    parts: list[bytes] = field(default_factory=list)
    """What it has sent, if that is to be written."""
    target: int | None = None
    """Where on the disk that goes; None: it is swallowed."""


class UsbStorage(UsbDevice):
    """A stick that holds what `disk` holds. Each write is flushed: drivers take sticks to have no cache.

    What `disk` raises the guest gets as a medium error (ENOSPC, EPERM and ENOMEDIUM as such); its `timeout` and `faults` are the stick's.
    """

    product = 0x0020
    names = ("Trivisor", "Stick")
    interfaces = (Interface(8, 6, 0x50, (Endpoint(_IN), Endpoint(_OUT))),)

    def __init__(self, disk: BlockDevice) -> None:
        if not isinstance(disk, BlockDevice):
            raise InvalidSpec(f"a stick's content is a BlockDevice, not {disk!r}")
        super().__init__(timeout=disk.timeout)
        self.disk = disk
        self.faults = disk.faults
        self.ejected = False
        """Whether the guest has ejected its medium; attached anew, or set to False, it is there again."""
        self._lock = threading.Lock()
        self._turn = 0
        """Commands and resets so far: what belongs to an earlier one is late."""
        self._command: _Command | None = None
        self._wedged = False
        self._sense = _NO_SENSE
        self._functions: dict[int, Callable[[bytes], bytes]] = {
            0x00: self._ready,
            0x03: self._request_sense,
            0x12: self._inquiry,
            0x1A: self._mode_sense,
            0x1B: self._start_stop,
            0x1E: lambda _: b"",  # nothing holds the medium
            0x23: self._formats,
            0x25: self._capacity,
            0x2F: self._ready,
            0x35: self._flush,
            0x5A: self._mode_sense,
            0x91: self._flush,
            0x9E: self._capacity_long,
            0xA0: lambda cdb: struct.pack(">IIQ", 8, 0, 0)[: int.from_bytes(cdb[6:10], "big")],
        }

    def served(self) -> Served:
        return Served("usb", self.disk.readonly, disk=True)

    # -- the transport ----------------------------------------------------------------------------

    def control(self, setup: Setup, data: bytes) -> bytes:
        if (setup.kind, setup.request) == _MAX_LUN:
            return b"\0"
        if (setup.kind, setup.request) == _RESET:
            self.reset()
            return b""
        raise Stall

    def reset(self) -> None:
        with self._lock:
            self._turn += 1
            self._command, self._wedged = None, False
        self.take_back(_IN)

    def received(self, endpoint: int, data: bytes) -> None:
        command = self._command
        if command is None or self._wedged:
            self._begin(data)
            return
        if len(data) > command.missing:
            self._wedge()
        command.missing -= len(data)
        if command.target is not None:
            command.parts.append(data)
        if not command.missing:
            self._carry_out(command)

    def late(self, endpoint: int) -> bool:
        with self._lock:
            command = self._command
            if command is None:
                return False
            self._turn += 1
            command = self._command = replace(command, turn=self._turn)
        self._end(command, _FAILED, sense=_UNREADABLE if command.inward else _UNWRITABLE)
        return True

    def _begin(self, data: bytes) -> None:
        """Take what should be a command wrapper."""
        mark, tag, length, flags, lun, size = _CBW.unpack_from(data) if len(data) == _CBW_SIZE else (0,) * 6
        if self._wedged or mark != _CBW_MARK or lun or not 1 <= size <= 16:
            self._wedge()
        cdb = data[_CBW.size : _CBW.size + size].ljust(16, b"\0")
        self.take_back(_IN)
        with self._lock:
            self._turn += 1
            command = self._command = _Command(tag, length, bool(flags & 0x80), cdb, self._turn)
        if not command.inward and length:
            command.missing = length
            with suppress(_Refused):
                if cdb[0] in _WRITES and (found := self._range(cdb))[1] == length:
                    command.target = found[0]
        else:
            self._carry_out(command)

    def _carry_out(self, command: _Command) -> None:
        """Do what the command asks; what it is given with it has come."""
        try:
            data = self._answer(command)
        except _Refused as refused:
            self._end(command, _FAILED, sense=refused.sense)
        except _OutOfStep:
            self._end(command, _PHASE)
        except Exception as error:
            self.faults.append(error)
            self._end(command, _FAILED, sense=_sense(error, command.inward))
        else:
            self._end(command, _PASSED, data)

    def _wedge(self) -> NoReturn:
        """Answer nothing but a reset from now on."""
        self._wedged = True
        self.halt(_IN)
        raise Stall

    def _end(self, command: _Command, status: int, data: bytes = b"", sense: Sense = _NO_SENSE) -> None:
        """Send a command's data and status, unless its turn has passed."""
        data = data[: command.length] if command.inward else b""
        left = command.length - (len(data) if command.inward or status else command.length)
        with self._lock, suppress(OSError):  # of a line that has gone: its reader knows
            if command.turn != self._turn:
                return
            self._command, self._sense = None, sense
            if command.inward and command.length:
                self.send(_IN, data)
            self.send(_IN, _CSW.pack(_CSW_MARK, command.tag, left, status))

    # -- commands ---------------------------------------------------------------------------------

    def _answer(self, command: _Command) -> bytes:
        """Return the data of a command that passed. Raises _Refused, _OutOfStep, and what the disk raises."""
        cdb = command.cdb
        if cdb[0] in _READS or cdb[0] in _WRITES:
            return self._move(command)
        function = self._functions.get(cdb[0])
        if function is None:
            raise _Refused(_NO_COMMAND)
        return function(cdb)

    def _move(self, command: _Command) -> bytes:
        self._ready(command.cdb)
        offset, length = self._range(command.cdb)
        writes = command.cdb[0] in _WRITES
        if length and (command.inward is writes or length > command.length or (writes and command.target is None)):
            raise _OutOfStep
        if not writes:
            return exactly(self.disk.read(offset, length), offset, length) if length else b""
        if self.disk.readonly:
            raise _Refused(_PROTECTED)
        if length:
            self.disk.write(offset, b"".join(command.parts))
            self.disk.flush()
        return b""

    def _range(self, cdb: bytes) -> tuple[int, int]:
        """Return where on the disk a command reads or writes, and how much, in bytes."""
        first, count = (struct.unpack_from(">IxH", cdb, 2)) if cdb[0] < 0x80 else struct.unpack_from(">QI", cdb, 2)
        if first + count > self._blocks:
            raise _Refused(_OUT_OF_RANGE)
        if count * SECTOR > MAX_TRANSFER:
            raise _Refused(_BAD_FIELD)
        return first * SECTOR, count * SECTOR

    @property
    def _blocks(self) -> int:
        return self.disk.size // SECTOR

    def _ready(self, _: bytes) -> bytes:
        if self.ejected:
            raise _Refused(_NO_MEDIUM)
        return b""

    def _flush(self, cdb: bytes) -> bytes:
        self._ready(cdb)
        self.disk.flush()
        return b""

    def _start_stop(self, cdb: bytes) -> bytes:
        if cdb[4] & 2:
            self.ejected = not cdb[4] & 1
        return b""

    def _request_sense(self, cdb: bytes) -> bytes:
        key, code, qualifier = self._sense
        return struct.pack(">BBBIBIBB4x", 0x70, 0, key, 0, 10, 0, code, qualifier)[: cdb[4]]

    def _inquiry(self, cdb: bytes) -> bytes:
        room = int.from_bytes(cdb[3:5], "big")
        if not cdb[1] & 1:
            names = [name.encode("ascii", "replace") for name in self.names]
            return struct.pack(">BBBBB3x8s16s4s", 0, 0x80, 4, 2, 31, names[0].ljust(8), names[1].ljust(16), b"1.0 ")[:room]
        serial = self.serial.encode()
        pages = {0x00: bytes([0x00, 0x80]), 0x80: serial}
        if cdb[2] not in pages:
            raise _Refused(_BAD_FIELD)
        return (bytes([0, cdb[2], 0, len(pages[cdb[2]])]) + pages[cdb[2]])[:room]

    def _mode_sense(self, cdb: bytes) -> bytes:
        if cdb[2] & 0x3F not in (0x08, 0x3F):
            raise _Refused(_BAD_FIELD)
        page = bytes([0x08, 18]).ljust(20, b"\0")  # caching: none of writes
        protected = 0x80 if self.disk.readonly else 0
        if cdb[0] == 0x1A:
            return (bytes([3 + len(page), 0, protected, 0]) + page)[: cdb[4]]
        return (struct.pack(">HBB4x", 6 + len(page), 0, protected) + page)[: int.from_bytes(cdb[7:9], "big")]

    def _formats(self, cdb: bytes) -> bytes:
        room = int.from_bytes(cdb[7:9], "big")
        return struct.pack(">3xBIBBH", 8, min(self._blocks, 0xFFFFFFFF), 2, 0, SECTOR)[:room]

    def _capacity(self, cdb: bytes) -> bytes:
        self._ready(cdb)
        return struct.pack(">II", min(self._blocks - 1, 0xFFFFFFFF), SECTOR)

    def _capacity_long(self, cdb: bytes) -> bytes:
        self._ready(cdb)
        if cdb[1] & 0x1F != 0x10:
            raise _Refused(_BAD_FIELD)
        return struct.pack(">QI20x", self._blocks - 1, SECTOR)[: int.from_bytes(cdb[10:14], "big")]


def _sense(error: Exception, reads: bool) -> Sense:
    """Return what the guest is told of what the disk raised."""
    known = {errno.ENOSPC: _NO_SPACE, errno.EPERM: _PROTECTED, errno.ENOMEDIUM: _NO_MEDIUM}
    number = error.errno if isinstance(error, OSError) else None
    return known.get(number or 0, _UNREADABLE if reads else _UNWRITABLE)
