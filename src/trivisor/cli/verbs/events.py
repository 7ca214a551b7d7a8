"""trivisor events."""

from __future__ import annotations

import time

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, open_vmm, verb
from trivisor.core.events import Event


@verb("events")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--since", type=click.IntRange(min=0), default=0, metavar="ID", help="Only what came after this event.")
@json_option
def command(follow: bool, since: int, as_json: bool) -> int:
    """Print what happened to machines."""
    try:
        for event in open_vmm().events(since, follow=follow):
            if as_json:
                render.emit(event, line=True)
            else:
                click.echo(_line(event))
    except KeyboardInterrupt:
        return 0
    return 0


def _line(event: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    what = f"{when}  {event.kind:<14} {event.name or event.machine}"
    return render.safe(f"{what}  {event.detail}" if event.detail else what)
