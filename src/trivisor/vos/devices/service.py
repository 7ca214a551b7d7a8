"""`vm.devices`: attach, list, detach, and where a device is in the guest.

A disk is the machine's until it is detached: it outlives this process, and a stop. A device made in Python is this process's: it answers
from here, and goes when the process does, or the machine stops.
"""

from __future__ import annotations

import builtins
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from trivisor.core.devices import Device, Disk, Served, SharedFolder, Value, check_name, kind_of, path_of
from trivisor.core.errors import GuestError, InvalidSpec, TrivisorError
from trivisor.vos.devices import place
from trivisor.vos.devices.block import BlockDevice
from trivisor.vos.devices.char import CharDevice
from trivisor.vos.devices.port import DevicePort
from trivisor.vos.devices.usb import UsbDevice
from trivisor.vos.files import Files

SEEN = 10.0
"""Seconds for a guest to find a device; it takes a tenth of one."""
_POLL = 0.01


class Server(Protocol):
    """What answers for a device in this process."""

    @property
    def open(self) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Attached:
    """One device of a machine."""

    name: str
    kind: str
    """disk, random, serial, network, folder, watchdog; or block, char, usb: made in Python."""
    plugged: bool
    """False for what is kept for the next start."""
    path: str = ""
    """Of a disk, a folder, a serial port: what it is on the host."""
    readonly: bool = False
    owner: int | None = None
    """Of a device made in Python: the process that answers for it."""


class Devices:
    """The devices of one machine."""

    def __init__(self, machine: str, port: DevicePort, files: Callable[[], Files], servers: MutableMapping[str, Server]) -> None:
        self._machine = machine
        self._port = port
        self._files = files
        self._servers = servers

    @property
    def kinds(self) -> frozenset[str]:
        """What this machine's wall can be given. Raises UnsupportedByWall if nothing."""
        return self._port.kinds

    def attach(self, device: Value | BlockDevice | CharDevice | UsbDevice, name: str | None = None) -> Attached:
        """Attach a device and return when the guest has found it; to a machine that is stopped, for its next start.

        `name` is free unless given; a disk bears it as its serial number. Raises InvalidSpec (a disk that leads elsewhere, or is
        attached or in use already; no free port), AlreadyExists (name), NotFound, InvalidState, Busy, UnsupportedByWall,
        HostLacks, EngineError, StorageError, GuestError if the guest does not find it, which takes it away again.
        """
        if not isinstance(device, Value | BlockDevice | CharDevice | UsbDevice):
            raise InvalidSpec(f"{device!r} is no device", hint="for example Disk('data.qcow2'), or an object of your BlockDevice")
        chosen = check_name(name) if name is not None else self._free(device)
        if isinstance(device, BlockDevice | CharDevice | UsbDevice):
            self._attach_served(chosen, device)
        else:
            self._port.attach(chosen, device, None)
            if self._port.running():
                self._await(chosen, device)
        return next(found for found in self.list() if found.name == chosen)

    def list(self) -> builtins.list[Attached]:
        """Return the machine's devices in the order in which they were attached."""
        return [
            Attached(
                name,
                kind_of(held.device),
                held.plugged,
                path_of(held.device),
                held.device.readonly if isinstance(held.device, Disk | Served | SharedFolder) else False,
                held.owner,
            )
            for name, held in self._port.held().items()
        ]

    def detach(self, name: str) -> None:
        """Pull a device out and return when the guest has let go of it; what it had not written to it is lost.

        Raises NotFound, InvalidState, Busy, EngineError, GuestError if the guest keeps it.
        """
        held = self._port.held().get(name)
        self._port.detach(name)
        server = self._servers.pop(name, None)
        if server is not None:
            server.close()
        if held is not None and held.plugged and place.where(held.device) in ("usb", "usb-storage"):
            self._await_gone(name, held.device)

    def node(self, name: str) -> str | None:
        """Return the device's path in the running guest, such as /dev/vdc, or /sys/bus/usb/devices/1-1;
        None if it has none, or has not been found."""
        held = self._port.held().get(name)
        return self._find(name, held.device) if held is not None and held.plugged else None

    def settle(self) -> None:
        """Wait until the guest has found what is plugged, at most as long as for an attach."""
        for name, held in self._port.held().items():
            if held.plugged:
                with suppress(GuestError):
                    self._wait(name, held.device)

    def _attach_served(self, name: str, device: BlockDevice | CharDevice | UsbDevice) -> None:
        """Answer for it on one end of a pair, and give the machine the other."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            server = device.serve(ours, name)
            try:
                self._port.attach(name, device.served(), theirs.fileno())
                theirs.close()
                self._servers[name] = server
                self._await(name, device.served())
            except BaseException:
                server.close()
                raise

    def _await(self, name: str, device: Device) -> None:
        try:
            self._wait(name, device)
        except TrivisorError as error:
            try:
                self.detach(name)
            except TrivisorError as failure:
                error.add_note(f"and it could not be taken away again: {failure}")
            raise

    def _wait(self, name: str, device: Device) -> None:
        deadline = time.monotonic() + SEEN
        while place.seen(device) and self._find(name, device) is None:
            if time.monotonic() > deadline:
                raise GuestError(f"the guest has not found {name} in {SEEN:g} s", machine=self._machine, hint="see logs(source='serial')")
            # The guest's kernel tells only its own programs.
            time.sleep(_POLL)

    def _await_gone(self, name: str, device: Device) -> None:
        """A USB device is gone at once, its controller does not ask; the guest takes a moment to see that."""
        deadline = time.monotonic() + SEEN
        with suppress(TrivisorError):
            while self._find(name, device) is not None and time.monotonic() < deadline:
                time.sleep(_POLL)

    def _find(self, name: str, device: Device) -> str | None:
        return place.find(self._files(), name, device, self._port.place(name) if place.has_port(device) else "")

    def _free(self, device: Value | BlockDevice | CharDevice | UsbDevice) -> str:
        kind = kind_of(device if isinstance(device, Value) else device.served())
        taken = self._port.held()
        return next(name for number in range(1, len(taken) + 2) if (name := f"{kind}{number}") not in taken)
