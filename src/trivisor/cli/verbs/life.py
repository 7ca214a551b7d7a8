"""trivisor start, pause, resume, stop, delete: one call each, on any number of machines."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.options import each, machines_argument, verb


@verb("start")
@machines_argument
def start(machines: Sequence[str]) -> None:
    """Start machines."""
    with render.Steps() as steps:
        each(machines, lambda machine: machine.start(progress=steps))


@verb("pause")
@machines_argument
def pause(machines: Sequence[str]) -> None:
    """Freeze running machines."""
    each(machines, lambda machine: machine.pause())


@verb("resume")
@machines_argument
def resume(machines: Sequence[str]) -> None:
    """Let paused and suspended machines go on."""
    each(machines, lambda machine: machine.resume())


@verb("stop")
@click.option("-t", "--time", "grace", type=click.FloatRange(min=0), default=10.0, show_default=True, help="Seconds it is given.")
@machines_argument
def stop(machines: Sequence[str], grace: float) -> None:
    """Power machines off.

    What runs in them gets SIGTERM, then SIGKILL; after the time given the machine is switched off.
    """
    each(machines, lambda machine: machine.stop(timeout=grace))


@verb("delete")
@click.option("-f", "--force", is_flag=True, help="In any state: what runs is killed, and an operation under way is not waited for.")
@machines_argument
def delete(machines: Sequence[str], force: bool) -> None:
    """Delete machines and their disks."""
    each(machines, lambda machine: machine.delete(force=force))
