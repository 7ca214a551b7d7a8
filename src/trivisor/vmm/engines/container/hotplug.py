"""What a container is given while it runs: lines made of Python (chars.py), and folders of the host (launch/bring.py)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from trivisor.core.devices import Device, SharedFolder
from trivisor.core.errors import GuestError, HostLacks
from trivisor.launch import bring
from trivisor.vmm import layers, plugged
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.container import memory
from trivisor.vmm.engines.container.chars import Chars
from trivisor.vos.files import Files
from trivisor.vos.line import Line
from trivisor.vos.processes import Processes


class Hotplug:
    """The devices of one running container."""

    kinds = frozenset({"char", "folder"})

    def __init__(self, box: Box) -> None:
        self._box = box
        self._chars = Chars(box)

    def modules(self, device: Device) -> tuple[str, ...]:
        if isinstance(device, SharedFolder) and os.geteuid() != 0:
            raise HostLacks(
                "a running container is given folders by root alone", hint="run as root, or make it with the folder as a volume"
            )
        return ()

    def plugged(self) -> set[str]:
        """Return the names of the devices that it has. Raises GuestError, GuestGone."""
        folders = self._folders()
        mounts = self._mounts() if folders else {}
        return self._chars.plugged() | {name for name, folder in folders.items() if folder.target in mounts}

    def place(self, name: str) -> str:
        return self._chars.place(name)

    def plug(self, name: str, device: Device, fd: int | None) -> None:
        """Plug `device`. Raises AlreadyExists, GuestError, EngineError, HostLacks."""
        if not isinstance(device, SharedFolder):
            self._chars.plug(name, device, fd)
            return
        line = Line.connect(self._box.dir.line, self._box.spec.name)
        try:
            files = Files(Processes(lambda: line, self._box.spec.name))
            if not files.exists(device.target):
                files.mkdir(device.target, parents=True)
        finally:
            line.close()
        mapped = layers.shape(self._box).ids(self._box.slot).mapped
        bring.bring(self._pid(), Path(device.path), device.target, readonly=device.readonly, mapped=mapped)

    def unplug(self, name: str) -> None:
        """Take a device away. Raises GuestError, EngineError."""
        folder = self._folders().get(name)
        if folder is None:
            self._chars.unplug(name)
        elif folder.target in (there := self._mounts()) or _moved(there, str(folder.path)):
            bring.take(self._pid(), folder.target)

    def _folders(self) -> dict[str, SharedFolder]:
        known = plugged.read(self._box.dir.root)
        return {name: device for name, entry in known.items() if isinstance(device := entry.device, SharedFolder)}

    def _mounts(self) -> dict[str, str]:
        """Return where something is mounted in it, and what of its file system (proc(5), mountinfo)."""
        try:
            text = Path(f"/proc/{self._pid()}/mountinfo").read_text()
        except OSError as error:
            raise GuestError("its mounts cannot be read", machine=self._box.spec.name) from error
        return {_plain(line.split()[4]): _plain(line.split()[3]) for line in text.splitlines()}

    def _pid(self) -> int:
        with memory.hold(self._box, False) as still:
            return still.pid


def _plain(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def _moved(mounts: Mapping[str, str], source: str) -> bool:
    """Whether what is mounted may be `source`, of which a mount says where it is within its file system."""
    return any(root != "/" and source.endswith(root) for root in mounts.values())
