"""trivisor memory: what machines take of the host's memory, and what they may take together."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trivisor.cli import render
from trivisor.cli.groups import group
from trivisor.cli.options import MACHINE, open_vmm, verb
from trivisor.cli.verbs import memory_figures, memory_view
from trivisor.core.units import format_size
from trivisor.vmm.budget import words


def _list(as_json: bool) -> None:
    vmm = open_vmm()
    budget, holdings, merged = vmm.budget.get(), vmm.budget.holdings(), vmm.dedupe.report()
    if as_json:
        render.emit({"budget": budget, "machines": holdings, "dedupe": merged})
        return
    render.table(
        ("MACHINE", "STATE", "HOLDS", "TAKES"),
        [(one.name, one.state, format_size(one.holds), format_size(one.takes)) for one in holdings],
    )
    click.echo(f"budget: {words(budget)}; held: {format_size(sum(one.holds for one in holdings))}")
    click.echo(f"equal pages: {merged}")


command = group(
    "memory", "Say what machines take of the host's memory; bound it; look into it.", _list, "List what machines hold and take."
)


@verb("budget")
@click.argument("size", required=False, metavar="[SIZE|none]")
@click.option("--overcommit", type=float, default=1.0, show_default=True, help="Promise this many times SIZE, while what is taken fits.")
def budget(size: str | None, overcommit: float) -> None:
    """Print or set what machines may have together.

    "none" takes the bound away. What does not fit is not started. It holds for all processes that use this home, until it is changed.
    """
    found = open_vmm().budget
    if size == "none":
        found.clear()
    elif size is not None:
        found.set(size, overcommit)
    click.echo(words(found.get()))


@verb("dedupe")
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
@click.argument("machines", type=MACHINE, nargs=-1, metavar="[MACHINE...]")
def dedupe(switch: str | None, machines: Sequence[str]) -> None:
    """Print or set whether equal pages are kept once.

    That is whether the host's kernel looks for them; as root, have it begin, or end. It looks at those of machines made with --dedupe, and
    of other programs that wish it. "off" puts back what was set before. With machines, it is these that are looked at from now on, or no
    longer.
    """
    vmm = open_vmm()
    for machine in [vmm.get(name) for name in machines]:
        machine.memory.dedupe(switch == "on")
    if switch == "on" and not machines:
        vmm.dedupe.start()
    elif switch == "off" and not machines:
        vmm.dedupe.stop()
    click.echo(str(vmm.dedupe.report()))


for one in (budget, dedupe, *memory_figures.COMMANDS, *memory_view.COMMANDS):
    command.add_command(one)
