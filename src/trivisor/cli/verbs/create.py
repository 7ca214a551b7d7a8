"""trivisor create."""

from __future__ import annotations

from typing import Any

import click

from trivisor.cli.options import IMAGE, open_vmm, spec_options, verb, wishes


@verb("create")
@spec_options
@click.argument("image", type=IMAGE)
def command(image: str, **options: Any) -> None:
    """Make a machine, without starting it.

    Its id is printed; its name, where none was given, is in `trivisor ps -a`.
    """
    machine = open_vmm().create(image, **wishes(options))
    click.echo(machine.id)
