"""trivisor doctor."""

from __future__ import annotations

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, open_vmm, verb
from trivisor.core.units import format_size
from trivisor.vmm.budget import words
from trivisor.vmm.choice import choose
from trivisor.vmm.engine import WallReport


@verb("doctor")
@json_option
def command(as_json: bool) -> int:
    """Say what this host offers, and what is missing.

    For each wall: whether machines can run behind it, and if not why and what would help; and which one a machine gets that
    names none, and why. Exit status 0 if at least one wall is available, else 1.
    """
    vmm = open_vmm()
    walls = vmm.walls()
    choice = choose(walls)
    budget, merged = vmm.budget.get(), vmm.dedupe.report()
    if as_json:
        render.emit({"walls": walls, "auto": choice, "memory": {"budget": budget, "dedupe": merged}})
    else:
        for report in walls:
            _print(report)
        click.echo(f"{click.style('auto', bold=True)}: {choice.wall or 'none can be used'}")
        click.echo(f"  why: {render.safe(choice.why)}")
        held = sum(holding.holds for holding in vmm.budget.holdings())
        click.echo(f"{click.style('memory', bold=True)}: {format_size(held)} held by machines")
        click.echo(f"  budget: {words(budget)}")
        click.echo(f"  equal pages: {merged}")
    return 0 if any(report.available for report in walls) else 1


def _print(report: WallReport) -> None:
    verdict = click.style("available", fg="green") if report.available else click.style("not available", fg="red")
    click.echo(f"{click.style(report.wall, bold=True)}: {verdict}")
    if report.why:
        click.echo(f"  why: {render.safe(report.why)}")
    if report.remedy:
        click.echo(f"  remedy: {render.safe(report.remedy)}")
    for key, text in report.details.items():
        click.echo(f"  {key}: {render.safe(text)}")
    able = [name for name, yes in report.features.items() if yes]
    unable = [name for name, yes in report.features.items() if not yes]
    if report.available and able:
        click.echo(f"  can: {', '.join(able)}")
    if report.available and unable:
        click.echo(f"  cannot: {', '.join(unable)}")
