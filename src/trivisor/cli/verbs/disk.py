"""trivisor disk: disks in from other hypervisors, for machines to have, and out to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivisor.cli import render
from trivisor.cli.groups import each, group
from trivisor.cli.options import DISK, json_option, open_vmm, verb
from trivisor.core.units import format_size

if TYPE_CHECKING:
    from trivisor.images.disks.catalog import StoredDisk
    from trivisor.vmm.packages import Appliance

FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vhd", "vdi")
_format = click.option("--format", "kind", type=click.Choice(FORMATS), help="[default: by the file's first bytes]")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


def _plain(disk: StoredDisk) -> dict[str, Any]:
    shown = ("name", "digest", "size", "stored", "format", "source", "created", "machines")
    return {**{key: getattr(disk, key) for key in shown}, "path": str(disk.path)}


def _list(as_json: bool) -> None:
    disks = open_vmm().disks.list()
    if as_json:
        render.emit([_plain(disk) for disk in disks])
        return
    rows = [
        (disk.name, format_size(disk.size), format_size(disk.stored), disk.format, render.ago(disk.created), ", ".join(disk.machines))
        for disk in disks
    ]
    render.table(("NAME", "SIZE", "STORED", "FROM", "CREATED", "MACHINES"), rows)


command = group(
    "disk", "List disks; bring them in from other hypervisors and out to them.", _list, "List disks, and the machines that have them."
)


@verb("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("name", default="")
@_format
@_quiet
@json_option
def import_(file: Path, name: str, kind: Any, quiet: bool, as_json: bool) -> None:
    """Bring in a disk image, or the disks of a package.

    An image is qcow2, raw, VMDK, VHDX, VHD or VDI; a package an .ova, or an .ovf with its files beside it. It is called as its file is
    unless NAME is given; several disks of a package are NAME-1, NAME-2 and so on.
    A machine is given one by `trivisor device attach MACHINE disk disk:NAME`.
    """
    disks = open_vmm().disks
    if kind is None and file.suffix.lower() in (".ova", ".ovf"):
        with render.Steps(quiet=quiet) as steps:
            _tell(disks.import_package(file, name, progress=steps), as_json)
        return
    with render.Steps(quiet=quiet) as steps:
        disk = disks.import_(file, name, kind, progress=steps)
    if as_json:
        render.emit(_plain(disk))
    else:
        click.echo(disk.name)


def _tell(package: Appliance, as_json: bool) -> None:
    if as_json:
        shown = ("name", "cpus", "memory", "system", "left_out")
        cards = [{"network": card.network, "mac": card.mac} for card in package.cards]
        render.emit({**{key: getattr(package, key) for key in shown}, "cards": cards, "disks": [_plain(disk) for disk in package.disks]})
        return
    for disk in package.disks:
        click.echo(disk.name)
    words = f"{package.cpus} processors, {format_size(package.memory)} of memory, {len(package.cards)} network cards"
    click.echo(f"trivisor: its machine has {words}", err=True)
    for left in package.left_out:
        click.echo(render.safe(f"trivisor: left out: {left}"), err=True)


@verb("export")
@click.argument("name", type=DISK)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(FORMATS), help="[default: by the file's name]")
@click.option("--machine", is_flag=True, help="NAME is a machine: its root, with all that it wrote.")
@click.option("--device", default="", metavar="DEVICE", help="Of that machine: what a disk that it was given holds now.")
@click.option("--size", help="Of a machine's root.  [default: as its own disk, or larger if need be]")
@click.option("--cpus", type=click.IntRange(1, 64), default=1, show_default=True, help="Of the machine that a package with a disk is of.")
@click.option("--memory", default="1G", show_default=True, help="The same.")
@_quiet
@json_option
def export(name: str, file: Path, kind: Any, machine: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Write a disk to a file for another hypervisor.

    A FILE that ends in .ova is a package, one that ends in .ovf too, with its other files beside it.
    With --machine a machine's root becomes one: a file system that fills it, with no partitions, and nothing in it to boot from.
    """
    device, size = given["device"], given["size"]
    if not machine and (device or size):
        raise click.UsageError("--device and --size go with --machine", click.get_current_context(silent=True))
    disks = open_vmm().disks
    with render.Steps(quiet=quiet) as steps:
        if machine:
            made = disks.export_machine(name, file, kind, device=device, size=size, progress=steps)
        else:
            made = disks.export(name, file, kind, cpus=given["cpus"], memory=given["memory"], progress=steps)
    if as_json:
        render.emit({"file": str(file.absolute()), "format": made.format, "size": made.size})
    else:
        click.echo(str(file))


@verb("inspect")
@click.argument("names", nargs=-1, required=True, type=DISK, metavar="NAME...")
@json_option
def inspect(names: Sequence[str], as_json: bool) -> None:  # noqa: ARG001 - it is JSON either way; the option is there for scripts
    """Print all that is known of disks, as JSON."""
    disks = open_vmm().disks
    render.emit([_plain(disks.get(name)) for name in names])


@verb("rm")
@click.argument("names", nargs=-1, required=True, type=DISK, metavar="NAME...")
def remove(names: Sequence[str]) -> None:
    """Remove disks. One that a machine has stays."""
    each(names, open_vmm().disks.remove)


for one in (import_, export, inspect, remove):
    command.add_command(one)
