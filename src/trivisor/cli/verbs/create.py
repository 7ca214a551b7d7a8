"""trivisor create."""

from __future__ import annotations

from typing import Any

import click

from trivisor.cli.options import IMAGE, open_vmm, snapshot_option, spec_options, verb, wishes


@verb("create")
@spec_options
@snapshot_option
@click.argument("image", type=IMAGE, required=False, default="")
def command(image: str, snapshot: str | None, **options: Any) -> None:
    """Make a machine, without starting it.

    Its id is printed; its name, where none was given, is in `trivisor ps -a`.
    """
    if bool(image) == bool(snapshot):
        raise click.UsageError("one of IMAGE and --snapshot is given", click.get_current_context())
    machine = open_vmm().create(image, snapshot=snapshot, **wishes(options, snapshot))
    click.echo(machine.id)
