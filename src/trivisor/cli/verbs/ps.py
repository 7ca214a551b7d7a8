"""trivisor ps."""

from __future__ import annotations

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, open_vmm, pairs, verb
from trivisor.core.state import State
from trivisor.core.units import format_size
from trivisor.vmm.machine import Machine


@verb("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Those that do not run, too.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("-l", "--label", multiple=True, metavar="KEY=VALUE", help="Only those that have it.")
@json_option
def command(everything: bool, quiet: bool, label: tuple[str, ...], as_json: bool) -> None:
    """List machines."""
    machines = open_vmm().list(labels=pairs(label, "label"))
    if not everything:
        machines = [machine for machine in machines if machine.state in (State.RUNNING, State.PAUSED)]
    if as_json:
        render.emit([machine.info() for machine in machines])
    elif quiet:
        for machine in machines:
            click.echo(machine.id)
    else:
        render.table(
            ("ID", "NAME", "IMAGE", "WALL", "STATE", "CPUS", "MEMORY", "PORTS", "CREATED"), [_row(machine) for machine in machines]
        )


def _row(machine: Machine) -> tuple[object, ...]:
    spec = machine.spec
    ports = ", ".join(f"{host}->{guest}" for host, guest in spec.ports.items())
    created = render.ago(machine.info()["created"])
    return (machine.id, machine.name, spec.image, spec.wall, machine.state.value, spec.cpus, format_size(spec.memory), ports, created)
