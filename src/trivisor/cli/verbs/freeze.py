"""trivisor snapshot, restore, fork, suspend: machines that are frozen, and come back."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.options import MACHINE, SNAPSHOT, each, json_option, machine_argument, machines_argument, open_vmm, verb
from trivisor.cli.verbs.snapshots import shown


@verb("snapshot")
@click.option(
    "--memory/--no-memory", default=None, help="With all that runs in it, or its files alone.  [default: memory where that can be]"
)
@click.option("--note", default="", help="For you.")
@click.option("--tag", "tags", multiple=True, help="A word to find it by; may be given often.")
@click.option("--ttl", metavar="TIME", help="Remove it after this long, such as 12h or 7d.")
@click.option("--keep", is_flag=True, help="Let nothing but `snapshots rm` remove it.")
@click.option("--quiesce", is_flag=True, help="Bring its file systems to rest first.")
@json_option
@machine_argument
@click.argument("name")
def snapshot(
    machine: str, name: str, memory: bool | None, note: str, tags: Sequence[str], ttl: str | None, keep: bool, quiesce: bool, as_json: bool
) -> None:
    """Freeze a machine under a name. It goes on."""
    taken = open_vmm().get(machine).snapshot(name, memory=memory, note=note, tags=tags, ttl=ttl, keep=keep, quiesce=quiesce)
    render.emit(shown(taken)) if as_json else click.echo(taken.ref)


@verb("restore")
@machine_argument
@click.argument("snapshot", type=SNAPSHOT)
def restore(machine: str, snapshot: str) -> None:
    """Have a machine be what it was at a snapshot.

    SNAPSHOT is one of its own by its name, or MACHINE@NAME of another of the same image. What the machine was until now is gone.
    """
    with render.Steps() as steps:
        open_vmm().get(machine).restore(snapshot, progress=steps)
    click.echo(machine)


@verb("fork")
@click.option("-n", "--number", type=click.IntRange(min=1), default=1, show_default=True, help="How many copies.")
@click.option("--name", "names", multiple=True, help="What a copy is called; as often as there are copies.  [default: MACHINE-1 ...]")
@json_option
@click.argument("machine", type=MACHINE)
def fork(machine: str, number: int, names: Sequence[str], as_json: bool) -> None:
    """Make running copies of a running machine.

    What runs in it goes on in each of them, which has its own id, name, address and random numbers. On the container wall a copy has its
    files, and starts anew.
    """
    number = len(names) if names and number == 1 else number
    with render.Steps() as steps:
        made = open_vmm().get(machine).fork(number, names=names or None, progress=steps)
    if as_json:
        render.emit([{"id": one.id, "name": one.name, "ports": one.spec.ports} for one in made])
        return
    for one in made:
        click.echo(one.name)


@verb("suspend")
@machines_argument
def suspend(machines: Sequence[str]) -> None:
    """Put machines away: memory on the disk, no process left; resume goes on."""
    each(machines, lambda machine: machine.suspend())
