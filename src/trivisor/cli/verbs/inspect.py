"""trivisor inspect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from trivisor.cli import render
from trivisor.cli.options import EITHER, json_option, open_vmm, verb
from trivisor.core.errors import InvalidSpec, NotFound

if TYPE_CHECKING:
    from trivisor.vmm.manager import VMM


@verb("inspect")
@json_option
@click.option("--type", "kind", type=click.Choice(["machine", "image"]), help="Only such a thing.  [default: a machine, else an image]")
@click.argument("names", nargs=-1, required=True, type=EITHER, metavar="NAME...")
def command(names: Sequence[str], kind: str | None, as_json: bool) -> None:  # noqa: ARG001 - it is JSON either way; the option is there for scripts
    """Print all that is known of machines or images, as JSON."""
    vmm = open_vmm()
    render.emit([_about(vmm, name, kind) for name in names])


def _about(vmm: VMM, name: str, kind: str | None) -> dict[str, Any]:
    if kind == "image":
        return vmm.images.inspect(name)
    try:
        return vmm.get(name).info()
    except NotFound:
        if kind is not None:
            raise
        try:
            return vmm.images.inspect(name)
        except (NotFound, InvalidSpec) as error:
            hint = "`trivisor ps -a` lists machines, `trivisor images` images"
            raise NotFound(f"there is no machine and no image {name}", hint=hint) from error
