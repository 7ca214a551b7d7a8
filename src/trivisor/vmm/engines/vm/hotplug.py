"""Devices that are plugged into a running QEMU, and pulled out again, over QMP.

Each goes into a spare PCIe root port of the machine's shape; the guest takes it by ACPI hot-plug. QEMU is jailed and can open
nothing: files travel to it as descriptors. What is plugged is asked of QEMU itself, so nothing that is remembered can be wrong.
Only after the guest is configured is anything plugged: ice knows of spare ports and of nothing in them.

A device's parts (blockdev, limits, chardev) bear its name, and are taken away with it, or when it could not be plugged.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from trivisor.core.devices import (
    Device,
    Disk,
    NetworkCard,
    PciPassthrough,
    Random,
    SerialSocket,
    Served,
    SharedFolder,
    UsbPassthrough,
    Watchdog,
    kind_of,
)
from trivisor.core.errors import EngineError, GuestError, HostLacks, InvalidSpec
from trivisor.launch.net import provide
from trivisor.vmm.engine import Box
from trivisor.vmm.engines.vm import kit, modules, passthrough, sharing
from trivisor.vmm.engines.vm.qmp import Qmp
from trivisor.vos.devices import diskfile, place

PREFIX = "hot-"
UNPLUG = 10.0
_WRITE = {"write-cache": "on", "werror": "report", "rerror": "report", "num-queues": 1}


class Hotplug:
    """The devices of one running machine."""

    kinds = frozenset({"disk", "block", "char", "usb", "random", "serial", "network", "folder", "watchdog", "hostusb", "hostpci"})

    def __init__(self, box: Box) -> None:
        self._box = box

    def modules(self, device: Device) -> tuple[str, ...]:
        """Return the modules that the guest must load for `device`, in their order. Raises InvalidSpec if its kernel has none for it."""
        driver = device.bus if isinstance(device, Disk) else "usb" if isinstance(device, UsbPassthrough) else kind_of(device)
        name = self._box.spec.kernel
        found = kit.have(self._box.home, name)
        if found is None:
            return ()
        if driver == "folder":
            spec = self._box.spec
            volumes = sharing.shares(spec)
            if spec.ram != "shared" and (volumes is None or volumes.kind != "virtiofs"):
                hint = 'make the machine with ram="shared", or with the folder as a volume'
                raise InvalidSpec("a folder's daemon must see the machine's memory", machine=spec.name, hint=hint)
            return found.shares
        if driver not in modules.DEVICES:
            return ()
        if name in kit.FLAVOURS and driver not in found.devices:
            raise InvalidSpec(
                f"the {name} kernel has no driver for {driver}", machine=self._box.spec.name, hint='make the machine with kernel="full"'
            )
        parameters, spared = modules.PARAMETERS, modules.NO_STICK if place.where(device) == "usb-storage" else frozenset()
        wanted = (known for known in found.devices.get(driver, ()) if known not in spared)
        return tuple(f"{known} {parameters[known]}" if known in parameters else known for known in wanted)

    def plugged(self) -> set[str]:
        """Return the names of the devices that QEMU has. Raises EngineError."""
        with self._qmp() as qmp:
            return _plugged(qmp)

    def place(self, name: str) -> str:
        """Return where the guest finds a device that is plugged: the address of its PCI port, "" if it has none. Raises EngineError."""
        with self._qmp() as qmp:
            for bus in qmp.ask("query-pci"):
                for port in bus["devices"]:
                    if any(device["qdev_id"] == PREFIX + name for device in port.get("pci_bridge", {}).get("devices", ())):
                        return f"0000:00:{port['slot']:02x}.{port['function']}"
        return ""

    def plug(self, name: str, device: Device, fd: int | None) -> None:
        """Plug `device`; `fd` is its file or socket, the caller's to close. Raises InvalidSpec, EngineError."""
        try:
            self._plug(name, device, fd)
        except EngineError as error:
            # QEMU locks an image's file, and says so when it is asked for the image or when a device wants to write to it.
            if not isinstance(device, Disk) or 'Failed to get "' not in str(error):
                raise
            hint = "one that writes to a disk must be alone with it: detach it there, or give readonly=True everywhere"
            machine = self._box.spec.name
            raise InvalidSpec(f"{device.path} is in use by another machine or program", machine=machine, hint=hint) from error

    def _plug(self, name: str, device: Device, fd: int | None) -> None:
        with self._qmp() as qmp, ExitStack() as undo:
            usb = (isinstance(device, Disk) and device.bus == "usb") or kind_of(device) in ("usb", "hostusb")
            port = _controller(qmp, self._box.spec.name) if usb else _free_port(qmp, self._box.spec.name)
            if isinstance(device, Served) and device.kind == "char":
                _plug_port(qmp, undo, name, port, _given(fd))
            elif isinstance(device, Served) and device.kind == "usb":
                _plug_line(qmp, undo, name, _given(fd))
                _redirect(qmp, name, port)
            elif isinstance(device, SerialSocket) or kind_of(device) == "serial":
                _plug_line(qmp, undo, name, _given(fd), listening=isinstance(device, SerialSocket))
                qmp.ask("device_add", _device(name, port, driver="pci-serial", chardev=PREFIX + name))
            elif isinstance(device, UsbPassthrough):
                passthrough.plug_usb(qmp, PREFIX + name, port, device)
            elif isinstance(device, PciPassthrough):
                undo.callback(_clear, qmp, name)
                passthrough.plug_pci(qmp, PREFIX + name, port, device, passthrough.engine_pid(self._box.dir), self._box.spec.memory)
            elif isinstance(device, Disk | Served):
                _plug_disk(qmp, undo, name, port, device, _given(fd))
            elif isinstance(device, Random):
                qmp.ask("object-add", {"qom-type": "rng-builtin", "id": f"{PREFIX}{name}-source"})
                undo.callback(_try, qmp, "object-del", {"id": f"{PREFIX}{name}-source"})
                qmp.ask("device_add", _device(name, port, driver="virtio-rng-pci", rng=f"{PREFIX}{name}-source"))
            else:
                self._plug_other(qmp, undo, name, port, device, fd)
            undo.pop_all()

    def _plug_other(
        self, qmp: Qmp, undo: ExitStack, name: str, port: str, device: NetworkCard | SharedFolder | Watchdog, fd: int | None
    ) -> None:
        node = PREFIX + name
        undo.callback(_clear, qmp, name)
        if isinstance(device, NetworkCard):
            qmp.ask("getfd", {"fdname": node}, fd=_given(fd))
            qmp.ask("netdev_add", {"type": "tap", "id": node, "fd": node})
            mac = device.mac or provide.mac(f"{self._box.id} {name}")
            qmp.ask("device_add", _device(name, port, driver="virtio-net-pci", netdev=node, mac=mac, romfile=""))
        elif isinstance(device, SharedFolder):
            with ExitStack() as stack:
                daemon = sharing.serve(stack, self._box.dir, f"folder-{name}", str(device.path), readonly=device.readonly)
                _plug_line(qmp, undo, name, daemon)
            qmp.ask("device_add", _device(name, port, driver="vhost-user-fs-pci", chardev=node, tag=node))
        else:
            qmp.ask("watchdog-set-action", {"action": device.action})
            qmp.ask("device_add", _device(name, port, driver="i6300esb"))

    def unplug(self, name: str) -> None:
        """Have the guest let go of a device and take it away. Raises EngineError, GuestError if the guest keeps it."""
        with self._qmp() as qmp:
            if name in _plugged(qmp):
                qmp.ask("device_del", {"id": PREFIX + name})
                if not qmp.wait_event("DEVICE_DELETED", lambda data: data.get("device") == PREFIX + name, UNPLUG):
                    raise GuestError(
                        f"the guest does not let go of {name}",
                        machine=self._box.spec.name,
                        hint="is it still starting, or without ACPI hot-plug? A stop takes the device away in any case",
                    )
            _clear(qmp, name)

    def _qmp(self) -> Qmp:
        return Qmp.connect(self._box.dir.qmp, self._box.spec.name)


def _given(fd: int | None) -> int:
    assert fd is not None
    return fd


def _plugged(qmp: Qmp) -> set[str]:
    found = qmp.ask("qom-list", {"path": "/machine/peripheral"})
    names = [str(entry["name"]) for entry in found if str(entry["type"]).startswith("child<")]
    return {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX) and "." not in name}


def _free_port(qmp: Qmp, machine: str) -> str:
    """Return a root port with nothing in it."""
    for bus in qmp.ask("query-pci"):
        for device in bus["devices"]:
            if device["qdev_id"].startswith("spare") and not device.get("pci_bridge", {}).get("devices"):
                return str(device["qdev_id"])
    raise InvalidSpec("the machine has no free port for another device", machine=machine, hint="detach one first")


def _device(name: str, port: str, **properties: Any) -> dict[str, Any]:
    return {"id": PREFIX + name, "bus": port, **properties}


def _plug_disk(qmp: Qmp, undo: ExitStack, name: str, port: str, device: Disk | Served, fd: int) -> None:
    node = PREFIX + name
    undo.callback(_clear, qmp, name)
    readonly = device.readonly
    if isinstance(device, Disk):
        with ExitStack() as sets:
            options: dict[str, Any] = {"driver": device.format, "node-name": node, "read-only": readonly, "discard": "unmap"}
            if device.format == "qcow2":
                options["backing"] = _below(qmp, sets, device.below) if device.below else None
            qmp.ask("blockdev-add", {**options, "file": _file(qmp, sets, fd)})
        if device.iops or device.bandwidth:
            node = _limit(qmp, name, node, device)
    else:
        qmp.ask("getfd", {"fdname": node}, fd=fd)
        qmp.ask(
            "blockdev-add",
            {"driver": "nbd", "node-name": node, "read-only": readonly, "discard": "unmap", "server": {"type": "fd", "str": node}},
        )
    bus = device.bus if isinstance(device, Disk) else "virtio"
    if bus == "virtio":
        qmp.ask("device_add", _device(name, port, driver="virtio-blk-pci", drive=node, serial=name, **_WRITE))
    elif bus == "nvme":
        qmp.ask("device_add", _device(name, port, driver="nvme", drive=node, serial=name))
    else:
        qmp.ask("device_add", _device(name, port, driver="usb-storage", drive=node, serial=name))


def _file(qmp: Qmp, sets: ExitStack, fd: int) -> dict[str, Any]:
    """Hand QEMU a file, and return what it is called there until `sets` closes: what was opened holds a descriptor of its own."""
    number = int(qmp.ask("add-fd", {}, fd=fd)["fdset-id"])
    sets.callback(qmp.ask, "remove-fd", {"fdset-id": number})
    return {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "on"}


def _below(qmp: Qmp, sets: ExitStack, path: str) -> dict[str, Any]:
    """The disk that a machine's own part lies over: many may read it, and nobody writes to it."""
    with diskfile.opened(Disk(path, "qcow2", readonly=True)) as fd:
        return {"driver": "qcow2", "read-only": True, "backing": None, "file": _file(qmp, sets, fd)}


def _limit(qmp: Qmp, name: str, node: str, disk: Disk) -> str:
    """Put a throttle before `node` and return its name."""
    limits = {"iops-total": disk.iops, "bps-total": disk.bytes_a_second}
    group = f"{PREFIX}{name}-limits"
    given = {key: value for key, value in limits.items() if value}
    qmp.ask("object-add", {"qom-type": "throttle-group", "id": group, "limits": given})
    qmp.ask("blockdev-add", {"driver": "throttle", "node-name": f"{node}-limit", "throttle-group": group, "file": node})
    return f"{node}-limit"


def _plug_port(qmp: Qmp, undo: ExitStack, name: str, port: str, fd: int) -> None:
    """A virtio-serial controller of its own with one port: that of the machine's line has none to spare."""
    node = PREFIX + name
    _plug_line(qmp, undo, name, fd)
    qmp.ask("device_add", _device(name, port, driver="virtio-serial-pci", max_ports=2))
    undo.callback(_try, qmp, "device_del", {"id": node})
    qmp.ask("device_add", {"driver": "virtserialport", "id": f"{node}.port", "bus": f"{node}.0", "nr": 1, "chardev": node, "name": name})


def _redirect(qmp: Qmp, name: str, port: str) -> None:
    try:
        qmp.ask("device_add", _device(name, port, driver="usb-redir", chardev=PREFIX + name))
    except EngineError as error:
        if "valid device model" not in str(error):
            raise
        # Distributions build that part apart, and with a library of its own.
        raise HostLacks("this QEMU cannot redirect USB", hint="apt-get install qemu-system-common libusbredirparser1") from error


def _plug_line(qmp: Qmp, undo: ExitStack, name: str, fd: int, *, listening: bool = False) -> None:
    """The socket behind a device, as a chardev; a `listening` one takes one caller after the other."""
    node = PREFIX + name
    undo.callback(_clear, qmp, name)
    qmp.ask("getfd", {"fdname": node}, fd=fd)
    backend = {
        "type": "socket",
        "data": {"addr": {"type": "fd", "data": {"str": node}}, "server": listening, **({"wait": False} if listening else {})},
    }
    qmp.ask("chardev-add", {"id": node, "backend": backend})


def _controller(qmp: Qmp, machine: str) -> str:
    """Return the bus of the USB controller, which takes a port when the first device needs it, and stays for the next."""
    if "usb" not in {entry["name"] for entry in qmp.ask("qom-list", {"path": "/machine/peripheral"})}:
        qmp.ask("device_add", {"driver": "qemu-xhci", "id": "usb", "bus": _free_port(qmp, machine), "p2": 15, "p3": 1})
    return "usb.0"


def _clear(qmp: Qmp, name: str) -> None:
    """Take away what is left behind a device that is no longer there."""
    node = PREFIX + name
    nodes = {entry["node-name"] for entry in qmp.ask("query-named-block-nodes", {"flat": True})}
    for part in (f"{node}-limit", node):
        if part in nodes:
            qmp.ask("blockdev-del", {"node-name": part})
    objects = {entry["name"] for entry in qmp.ask("qom-list", {"path": "/objects"})}
    for part in (f"{node}-limits", f"{node}-source", f"{node}-iommu"):
        if part in objects:
            qmp.ask("object-del", {"id": part})
    # Which of these there are QEMU does not tell.
    _try(qmp, "netdev_del", {"id": node})
    if node in {entry["label"] for entry in qmp.ask("query-chardev")}:
        qmp.ask("chardev-remove", {"id": node})


def _try(qmp: Qmp, command: str, arguments: dict[str, Any]) -> None:
    """Take back a step of what failed: that it cannot be is no news beside that."""
    with suppress(EngineError):
        qmp.ask(command, arguments)
