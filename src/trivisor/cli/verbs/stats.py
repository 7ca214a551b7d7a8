"""trivisor stats."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.options import MACHINE, json_option, open_vmm, verb
from trivisor.core.state import LEGAL
from trivisor.core.units import format_size
from trivisor.vmm.machine import Machine, Stats


@verb("stats")
@json_option
@click.argument("machines", type=MACHINE, nargs=-1, metavar="[MACHINE...]")
def command(machines: Sequence[str], as_json: bool) -> None:
    """Print what running machines use."""
    vmm = open_vmm()
    chosen = [vmm.get(name) for name in machines] if machines else [m for m in vmm.list() if m.state in LEGAL["stats"]]
    found = [(machine, machine.stats()) for machine in chosen]
    if as_json:
        render.emit([{"id": machine.id, "name": machine.name, "stats": stats} for machine, stats in found])
        return
    headers = ("NAME", "STATE", "HOST PRIVATE", "HOST SHARED", "HOST CPU", "MEMORY USED", "DISK USED", "LOAD")
    render.table(headers, [_row(machine, stats) for machine, stats in found])


def _row(machine: Machine, stats: Stats) -> tuple[str, ...]:
    said = stats.guest
    memory = _used(said, "memory_total", "memory_available")
    disk = _used(said, "disk_total", "disk_free")
    load = f"{said['load1']:.2f}" if "load1" in said else "-"
    host = (format_size(stats.private), format_size(stats.shared), f"{stats.cpu_seconds:.1f}s")
    return (machine.name, machine.state.value, *host, memory, disk, load)


def _used(said: dict[str, float], total: str, free: str) -> str:
    if total not in said or free not in said:
        return "-"
    return f"{format_size(max(0, int(said[total] - said[free])))} of {format_size(int(said[total]))}"
