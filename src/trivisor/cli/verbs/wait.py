"""trivisor wait."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli.options import machines_argument, open_vmm, verb


@verb("wait")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait at most.  [default: for ever]")
@machines_argument
def command(machines: Sequence[str], timeout: float | None) -> None:
    """Wait until machines no longer run; print their exit status."""
    vmm = open_vmm()
    for name in machines:
        status = vmm.get(name).wait(timeout)
        click.echo("-" if status is None else status)
