"""trivisor health."""

from __future__ import annotations

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, machine_argument, open_vmm, verb


@verb("health")
@click.option("--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="Check again until it is healthy, for so long.")
@click.option("--last", is_flag=True, help="Do not check: print what the last check said.")
@json_option
@machine_argument
def command(machine: str, wait: float | None, last: bool, as_json: bool) -> int:
    """Check whether a machine is well, as its image says.

    Prints "healthy", "starting", "unhealthy", or "none" for an image without a check, and what the check said. Our exit status is 1 for
    "starting" and "unhealthy".
    """
    if last and wait is not None:
        raise click.UsageError("--last goes without --wait: it checks nothing", click.get_current_context())
    found = open_vmm().get(machine)
    now = found.health(check=not last) if wait is None else found.wait_healthy(wait)
    if as_json:
        render.emit(now)
    else:
        said = now.checks[-1].output.strip() if now.checks else ""
        click.echo(now.status + (f": {render.safe(said)}" if said else ""))
    return 0 if now.status in ("healthy", "none") else 1
