"""trivisor modify."""

from __future__ import annotations

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, machine_argument, open_vmm, verb


@verb("modify")
@click.option("--cpus", type=float, help="Virtual processors; on container and gvisor also parts of one.")
@click.option("-m", "--memory", metavar="SIZE", help="Memory, such as 512M.")
@click.option("--disk", metavar="SIZE", help="The writable layer, larger than it is.")
@click.option("--dry-run", is_flag=True, help="Only say what would be changed, and when.")
@json_option
@machine_argument
def command(machine: str, cpus: float | None, memory: str | None, disk: str | None, dry_run: bool, as_json: bool) -> None:
    """Change a machine's memory, processors and disk, while it runs where that can be."""
    plan = open_vmm().get(machine).modify(cpus=cpus, memory=memory, disk=disk, dry_run=dry_run)
    if as_json:
        render.emit(plan.changes)
    else:
        click.echo(str(plan))
