"""trivisor images: what machines are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from trivisor.cli import render
from trivisor.cli.options import IMAGE, home_option, json_option, open_vmm, verb
from trivisor.core.units import format_size


@click.group("images", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@home_option
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List, import, bootstrap and remove images."""
    if ctx.invoked_subcommand is None:
        _list(as_json)


@verb("list")
@json_option
def list_(as_json: bool) -> None:
    """List images."""
    _list(as_json)


def _list(as_json: bool) -> None:
    images = open_vmm().images.list()
    if as_json:
        shown = ("name", "digest", "size", "created", "config")
        render.emit([{key: getattr(image, key) for key in shown} for image in images])
        return
    rows = [(image.name, image.digest.removeprefix("sha256:")[:12], format_size(image.size), render.ago(image.created)) for image in images]
    render.table(("NAME", "DIGEST", "SIZE", "CREATED"), rows)


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
    images = open_vmm().images
    for name in names:
        images.remove(name)
        click.echo(name)


for sub in (list_, import_, bootstrap, remove):
    command.add_command(sub)
