"""trivisor device: what a machine is given and rid of while it runs, and what the host has to give.

Only what outlives this process is here. A device made in Python belongs to the program that answers for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from trivisor.cli import render
from trivisor.cli.groups import group
from trivisor.cli.options import MACHINE, json_option, machine_argument, open_vmm, verb
from trivisor.core.devices import (
    KINDS,
    Disk,
    NetworkCard,
    PciPassthrough,
    Random,
    SerialSocket,
    SharedFolder,
    UsbPassthrough,
    Value,
    Watchdog,
)
from trivisor.core.errors import HostLacks
from trivisor.vos.devices import host_pci, host_usb

_OPTIONS: dict[str, tuple[str, ...]] = {
    "disk": ("format", "bus", "readonly", "iops", "bandwidth"),
    "folder": ("readonly",),
    "network": ("mac",),
}
"""Which options say more of each kind."""


def _show(machines: Sequence[str], as_json: bool) -> None:
    vmm = open_vmm()
    chosen = [vmm.get(name) for name in machines] if machines else vmm.list()
    found = [(machine, one) for machine in chosen for one in machine.devices.list()]
    if as_json:
        render.emit([{"machine": machine.name, "device": one, "node": _node(machine, one.name)} for machine, one in found])
        return
    rows = [
        (machine.name, one.name, one.kind, _state(one.plugged, one.owner), _node(machine, one.name) or "-", one.path or "-")
        for machine, one in found
    ]
    render.table(("MACHINE", "NAME", "KIND", "STATE", "IN THE GUEST", "ON THE HOST"), rows)


def _node(machine: Any, name: str) -> str | None:
    """Where it is in the guest; a machine that is paused or stopped is not asked."""
    found: str | None = machine.devices.node(name) if machine.state.value == "running" else None
    return found


def _state(plugged: bool, owner: int | None) -> str:
    if not plugged:
        return "kept for the next start"
    return "plugged" if owner is None else f"plugged, by process {owner}"


command = group("device", "Attach, list and detach devices.", lambda as_json: _show((), as_json), "List devices.")


@verb("list")
@json_option
@click.argument("machines", type=MACHINE, nargs=-1, metavar="[MACHINE...]")
def list_(machines: Sequence[str], as_json: bool) -> None:
    """List devices of machines, of all if none is named."""
    _show(machines, as_json)


@verb("attach")
@machine_argument
@click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")
@click.argument("what", required=False)
@click.option("--name", help="What it is called; a disk bears it as its serial number.  [default: kind and number]")
@click.option("--readonly", is_flag=True, default=None, help="The guest may only read it (disk, folder).")
@click.option("--format", type=click.Choice(["raw", "qcow2"]), help="Of a disk's file.  [default: qcow2 if it ends so, else raw]")
@click.option("--bus", type=click.Choice(["virtio", "nvme", "usb"]), help="What the guest finds a disk at.  [default: virtio]")
@click.option("--iops", type=int, help="How often a second a disk may be read and written.")
@click.option("--bandwidth", metavar="SIZE", help="How many bytes a second, such as 10M.")
@click.option("--mac", help="Address of a network card.  [default: one of its own]")
@json_option
def attach(machine: str, kind: str, what: str | None, name: str | None, as_json: bool, **options: Any) -> None:
    """Attach a device.

    Its name is printed when the guest has found it. A machine that is stopped has it from its next start on.

    \b
    disk FILE|disk:NAME          a file, a block device of the host, or a disk of `trivisor disk`
    folder SOURCE:PATH[:ro]      a folder of the host, at PATH in the guest
    network [NETWORK]            a further network card, on nat or a named network
    serial SOCKET                a serial port, whose other end is a unix socket
    random                       a source of random numbers
    watchdog [ACTION]            reset (the default), poweroff, pause or none
    hostusb ID|PORT              a USB device of the host: 046d:c52b, or 1-2.4
    hostpci ADDRESS              a PCI device of the host: 01:00.0
    """
    given = {key: value for key, value in options.items() if value is not None}
    if wrong := [f"--{key}" for key in given if key not in _OPTIONS.get(kind, ())]:
        raise click.UsageError(f"{kind} has no {', '.join(wrong)}")
    made = open_vmm().get(machine).devices.attach(_MAKERS[kind](what, given), name)
    if as_json:
        render.emit(made)
    else:
        click.echo(made.name)


@verb("detach")
@machine_argument
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def detach(machine: str, names: Sequence[str]) -> None:
    """Pull devices out.

    What a guest had not written to one is lost.
    """
    devices = open_vmm().get(machine).devices
    for name in names:
        devices.detach(name)
        click.echo(name)


@verb("host")
@json_option
def host(as_json: bool) -> None:
    """List the host's USB and PCI devices.

    With what stands between each and a machine, and what root must do about that.
    """
    usb, pci = _there(host_usb), _there(host_pci)
    if as_json:
        render.emit({"usb": usb, "pci": [{"device": one, "ready": one.ready, "todo": one.todo} for one in pci or ()] if pci else pci})
        return
    click.echo("USB: none" if not usb else "USB:")
    for one in usb or ():
        click.echo(render.safe(f"  {one}"))
    click.echo("PCI: none" if not pci else "PCI:")
    said: tuple[str, ...] = ()
    for device in pci or ():
        # Without an IOMMU the same is to be done for each: it is said once.
        lines = [line for line in str(device).splitlines() if not (device.todo == said and line.startswith("to do:"))]
        said = device.todo
        click.echo(render.safe("\n".join(f"  {line}" for line in lines)))


def _there(look: Callable[[], list[Any]]) -> list[Any] | None:
    """What the host has of a kind; None if it has not even the bus."""
    try:
        return look()
    except HostLacks:
        return None


def _needed(kind: str, what: str | None) -> str:
    if what is None:
        raise click.UsageError(f"a {kind} needs to be told what it is made of", click.get_current_context(silent=True))
    return what


def _nothing(kind: str, what: str | None) -> None:
    if what is not None:
        raise click.UsageError(f"{kind} is made of nothing, not of {what!r}", click.get_current_context(silent=True))


def _folder(what: str | None, given: dict[str, Any]) -> Value:
    text = _needed("folder", what)
    if text.endswith((":ro", ":rw")):
        text, given = text[:-3], {"readonly": text.endswith(":ro"), **given}
    source, colon, target = text.rpartition(":")
    if not colon or not source or not target:
        raise click.UsageError(f"folder {what!r} is not SOURCE:PATH[:ro]", click.get_current_context(silent=True))
    return SharedFolder(source, target, **given)


def _random(what: str | None, _given: dict[str, Any]) -> Value:
    _nothing("random", what)
    return Random()


_MAKERS: dict[str, Callable[[str | None, dict[str, Any]], Value]] = {
    "disk": lambda what, given: Disk(_needed("disk", what), **given),
    "folder": _folder,
    "network": lambda what, given: NetworkCard(what or "nat", **given),
    "serial": lambda what, given: SerialSocket(_needed("serial port", what), **given),
    "random": _random,
    "watchdog": lambda what, given: Watchdog(what or "reset"),  # type: ignore[arg-type]  # the value checks it
    "hostusb": lambda what, given: UsbPassthrough(_needed("USB device", what)),
    "hostpci": lambda what, given: PciPassthrough(_needed("PCI device", what)),
}

for one in (list_, attach, detach, host):
    command.add_command(one)
