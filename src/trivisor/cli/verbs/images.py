"""trivisor images: what machines are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from trivisor.cli import render
from trivisor.cli.groups import each, group
from trivisor.cli.options import IMAGE, open_vmm, verb
from trivisor.core.units import format_size


def _list(as_json: bool) -> None:
    images = open_vmm().images.list()
    if as_json:
        shown = ("name", "digest", "size", "created", "config")
        render.emit([{key: getattr(image, key) for key in shown} for image in images])
        return
    rows = [(image.name, image.digest.removeprefix("sha256:")[:12], format_size(image.size), render.ago(image.created)) for image in images]
    render.table(("NAME", "DIGEST", "SIZE", "CREATED"), rows)


command = group("images", "List, import, bootstrap and remove images.", _list, "List images.")


@verb("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("name")
def import_(source: Path, name: str) -> None:
    """Make an image of a folder, a tar (also compressed), a `docker save` archive or an OCI layout."""
    with render.Steps() as steps:
        image = open_vmm().images.import_(source, name, progress=steps)
    click.echo(image.digest)


@verb("bootstrap")
@click.argument("name", default="debian")
@click.option("--suite", default="bookworm", show_default=True, help="Debian release.")
@click.option("--package", "packages", multiple=True, default=["python3-minimal"], show_default=True, help="May be given often.")
def bootstrap(name: str, suite: str, packages: Sequence[str]) -> None:
    """Make an image of Debian, from its package archive."""
    with render.Steps() as steps:
        image = open_vmm().images.bootstrap(name, suite, packages, progress=steps)
    click.echo(image.digest)


@verb("rm")
@click.argument("names", nargs=-1, required=True, type=IMAGE, metavar="NAME...")
def remove(names: Sequence[str]) -> None:
    """Remove images. One that a machine was made from stays."""
    each(names, open_vmm().images.remove)


for sub in (import_, bootstrap, remove):
    command.add_command(sub)
