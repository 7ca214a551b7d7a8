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
    "--source",
    type=click.Choice([*SOURCES, "all"]),
    help="The console, PID 1, QEMU, rules that log, the program.  [default: program if it wrote anything, else serial]",
)
@machine_argument
def command(machine: str, follow: bool, source: str | None) -> int:
    """Print what a machine's program wrote, its console, or PID 1's log.

    On a terminal control characters are left out, colours excepted: they are a guest's, who may be hostile.
    """
    tty = sys.stdout.isatty()
    try:
        found = open_vmm().get(machine)
        for chunk in found.logs(follow=follow, source=source or found.main_log):
            if tty:
                click.echo(render.safe(chunk.decode(errors="replace"), colours=True), nl=False)
            else:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        return 0
    return 0
