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
    """Bring in a disk image: qcow2, raw, VMDK, VHDX, VHD or VDI.

    It is called as its file is unless NAME is given. A machine is given it by `trivisor device attach MACHINE disk disk:NAME`.
    """
    with render.Steps(quiet=quiet) as steps:
        disk = open_vmm().disks.import_(file, name, kind, progress=steps)
    if as_json:
        render.emit(_plain(disk))
    else:
        click.echo(disk.name)


@verb("export")
@click.argument("name", type=DISK)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(FORMATS), help="[default: by the file's name]")
@click.option("--machine", is_flag=True, help="NAME is a machine: its root, with all that it wrote.")
@click.option("--device", default="", metavar="DEVICE", help="Of that machine: what a disk that it was given holds now.")
@click.option("--size", help="Of a machine's root.  [default: as its own disk, or larger if need be]")
@_quiet
@json_option
def export(name: str, file: Path, kind: Any, machine: bool, device: str, size: str | None, quiet: bool, as_json: bool) -> None:
    """Write a disk to a file for another hypervisor.

    With --machine a machine's root becomes one: a file system that fills it, with no partitions, and nothing in it to boot from.
    """
    if not machine and (device or size):
        raise click.UsageError("--device and --size go with --machine", click.get_current_context(silent=True))
    disks = open_vmm().disks
    with render.Steps(quiet=quiet) as steps:
        if machine:
            made = disks.export_machine(name, file, kind, device=device, size=size, progress=steps)
        else:
            made = disks.export(name, file, kind, progress=steps)
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
