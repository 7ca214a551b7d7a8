"""trivisor memory: what machines take of the host's memory, and what they may take together."""

from __future__ import annotations

import click

from trivisor.cli import render
from trivisor.cli.groups import group
from trivisor.cli.options import open_vmm, verb
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


command = group("memory", "Say what machines take of the host's memory; bound it.", _list, "List what machines hold and take.")


@verb("budget")
@click.argument("size", required=False, metavar="[SIZE|none]")
@click.option("--overcommit", type=float, default=1.0, show_default=True, help="Promise this many times SIZE, while what is taken fits.")
def budget(size: str | None, overcommit: float) -> None:
    """Print, set or take away the memory that the machines of this home may have together.

    What does not fit is not started. It holds for all processes that use this home, until it is changed.
    """
    found = open_vmm().budget
    if size == "none":
        found.clear()
    elif size is not None:
        found.set(size, overcommit)
    click.echo(words(found.get()))


@verb("dedupe")
@click.argument("switch", required=False, type=click.Choice(["on", "off"]))
def dedupe(switch: str | None) -> None:
    """Print whether the host's kernel looks for equal pages, which it then keeps once; as root, have it begin, or end.

    It looks at those of machines made with --dedupe, and of other programs that wish it. "off" puts back what was set before.
    """
    found = open_vmm().dedupe
    if switch == "on":
        found.start()
    elif switch == "off":
        found.stop()
    click.echo(str(found.report()))


for one in (budget, dedupe):
    command.add_command(one)
