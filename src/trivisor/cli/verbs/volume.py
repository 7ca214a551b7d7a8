"""trivisor volume: folders of the home that machines share and that outlive them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.groups import each, group
from trivisor.cli.options import VOLUME, open_vmm, verb


def _list(as_json: bool) -> None:
    volumes = open_vmm().volumes.list()
    if as_json:
        render.emit([{"name": one.name, "path": str(one.path), "created": one.created, "machines": list(one.machines)} for one in volumes])
        return
    render.table(("NAME", "CREATED", "MACHINES"), [(one.name, render.ago(one.created), ", ".join(one.machines)) for one in volumes])


command = group("volume", "List, make and remove volumes.", _list, "List volumes, and the machines that have them.")


@verb("create")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def create(names: Sequence[str]) -> None:
    """Make empty volumes. One that a machine names is made by itself."""
    volumes = open_vmm().volumes
    for name in names:
        click.echo(volumes.create(name).name)


@verb("rm")
@click.argument("names", nargs=-1, required=True, type=VOLUME, metavar="NAME...")
def remove(names: Sequence[str]) -> None:
    """Remove volumes with all that is in them. One that a machine has stays."""
    each(names, open_vmm().volumes.remove)


for one in (create, remove):
    command.add_command(one)
