"""trivisor memory stats, limit, balloon, reclaim, swap: what one machine has of memory, and may have."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.options import MACHINE, json_option, machine_argument, open_vmm, verb
from trivisor.core.state import LEGAL
from trivisor.core.units import format_size

_timeout = click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds that a virtual machine's guest has for it.")


@verb("stats")
@json_option
@click.argument("machines", type=MACHINE, nargs=-1, metavar="[MACHINE...]")
def stats(machines: Sequence[str], as_json: bool) -> None:
    """Print figures of machines.

    What they may have, have, and take of the host; of all that run if none is named.
    """
    vmm = open_vmm()
    chosen = [vmm.get(name) for name in machines] if machines else [m for m in vmm.list() if m.state in LEGAL["stats"]]
    found = [(machine, machine.memory.stats()) for machine in chosen]
    if as_json:
        render.emit([{"id": machine.id, "name": machine.name, "memory": figures} for machine, figures in found])
        return
    headers = ("NAME", "LIMIT", "USED", "CACHE", "SWAP", "PRESSURE", "MAJOR FAULTS", "HOST PRIVATE", "HOST SHARED", "MERGED")
    rows = []
    for machine, one in found:
        sizes = [_size(size) for size in (one.limit, one.used, one.cache, one.swap)]
        waits = "-" if one.pressure is None else f"{one.pressure:.1%}"
        faults = "-" if one.major_faults is None else one.major_faults
        rows.append((machine.name, *sizes, waits, faults, *(_size(size) for size in (one.private, one.shared, one.merged))))
    render.table(headers, rows)


@verb("limit")
@machine_argument
@click.argument("size")
@_timeout
def limit(machine: str, size: str, timeout: float) -> None:
    """Change what a machine may have.

    At once if it runs, and from its next start on. SIZE is such as 512M.
    """
    open_vmm().get(machine).memory.limit(size, timeout=timeout)


@verb("balloon")
@machine_argument
@click.argument("size")
@_timeout
def balloon(machine: str, size: str, timeout: float) -> None:
    """Have a guest give up memory, or get it back.

    SIZE of what its virtual machine was started with, in all; 0 gives everything back. Prints what it gave up.
    """
    click.echo(format_size(open_vmm().get(machine).memory.balloon(_bytes(size), timeout=timeout)))


@verb("reclaim")
@machine_argument
@click.argument("size", required=False)
def reclaim(machine: str, size: str | None) -> None:
    """Take back what a machine does not need now.

    SIZE of it, or all that there is. Prints how much was taken.
    """
    click.echo(format_size(open_vmm().get(machine).memory.reclaim(size)))


@verb("swap")
@machine_argument
@click.argument("size", metavar="SIZE|all")
def swap(machine: str, size: str) -> None:
    """Change how much swap a machine may have.

    Of the host's, beside its memory. 0: none; all: what the host has.
    """
    open_vmm().get(machine).memory.swap(None if size == "all" else _bytes(size))


def _bytes(size: str) -> int | str:
    return 0 if size == "0" else size


def _size(size: int | None) -> str:
    return "-" if size is None else format_size(size)


COMMANDS = (stats, limit, balloon, reclaim, swap)
