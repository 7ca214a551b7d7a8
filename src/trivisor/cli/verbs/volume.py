"""trivisor volume: folders of the home that machines share and that outlive them."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.options import VOLUME, home_option, json_option, open_vmm, verb


@click.group("volume", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@home_option
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List, make and remove volumes."""
    if ctx.invoked_subcommand is None:
        _list(as_json)


@verb("list")
@json_option
def list_(as_json: bool) -> None:
    """List volumes, and the machines that have them."""
    _list(as_json)


def _list(as_json: bool) -> None:
    volumes = open_vmm().volumes.list()
    if as_json:
        render.emit([{"name": one.name, "path": str(one.path), "created": one.created, "machines": list(one.machines)} for one in volumes])
        return
    render.table(("NAME", "CREATED", "MACHINES"), [(one.name, render.ago(one.created), ", ".join(one.machines)) for one in volumes])


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
    volumes = open_vmm().volumes
    for name in names:
        volumes.remove(name)
        click.echo(name)


for one in (list_, create, remove):
    command.add_command(one)
