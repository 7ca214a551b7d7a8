"""trivisor logs."""

from __future__ import annotations

import sys

import click

from trivisor.cli import render
from trivisor.cli.options import machine_argument, open_vmm, verb
from trivisor.vmm.logs import SOURCES


@verb("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine stops.")
@click.option(
    "--source", type=click.Choice([*SOURCES, "all"]), default="serial", show_default=True, help="The console, PID 1, QEMU, rules that log."
)
@machine_argument
def command(machine: str, follow: bool, source: str) -> int:
    """Print a machine's console or PID 1's log.

    On a terminal control characters are left out, colours excepted: they are a guest's, who may be hostile.
    """
    tty = sys.stdout.isatty()
    try:
        for chunk in open_vmm().get(machine).logs(follow=follow, source=source):
            if tty:
                click.echo(render.safe(chunk.decode(errors="replace"), colours=True), nl=False)
            else:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        return 0
    return 0
