"""trivisor import, export, save, load: images out of files and into files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivisor.cli import late, render
from trivisor.cli.bars import Bars
from trivisor.cli.options import IMAGE, json_option, verb

if TYPE_CHECKING:
    from trivisor.images.catalog import Image, Images
    from trivisor.images.model import Platform

_CHUNK = 1 << 20
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
_platform = click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Of an image for several.  [default: this host's]")


def _parsed(platform: str | None) -> Platform | None:
    from trivisor.images.model import Platform

    return Platform.parse(platform) if platform else None


@contextmanager
def _source(images: Images, path: Path | None) -> Iterator[Path]:
    """Give the file, or standard input as one: it is read more than once."""
    if path is not None and str(path) != "-":
        yield path
        return
    if sys.stdin.isatty():
        raise click.UsageError("there is nothing on standard input: name a file", click.get_current_context(silent=True))
    from trivisor.store.faults import translated

    with images.workspace() as work:
        file = work.path / "-"  # no name that an image could have
        with translated(work.path), file.open("xb") as out:
            while data := sys.stdin.buffer.read(_CHUNK):
                out.write(data)
        yield file


def _tell(image: Image) -> dict[str, object]:
    return {"name": image.name, "digest": image.digest, "size": image.size, "platform": str(image.platform)}


@verb("import")
@click.argument("source", type=click.Path(exists=True, allow_dash=True, path_type=Path))
@click.argument("name")
@_platform
@_quiet
@json_option
def import_(source: Path, name: str, platform: str | None, quiet: bool, as_json: bool) -> None:
    """Make an image of a folder, a tar, or an archive of images.

    A tar may be packed (gzip, zstd, bzip2, xz), and be what `docker save` wrote or an OCI layout; then NAME says which of its images.
    With - it is read from standard input.
    """
    wanted = _parsed(platform)
    images = late.opened().images
    with render.Steps(quiet=quiet) as steps, _source(images, source) as file:
        image = images.import_(file, name, platform=wanted, progress=steps)
    if as_json:
        render.emit(_tell(image))
    else:
        click.echo(image.digest)


@verb("load")
@click.option("-i", "--input", "source", type=click.Path(exists=True, allow_dash=True, path_type=Path), help="Instead of standard input.")
@click.option("--base", default="", metavar="NAME", help="Of images that have but a tag there.  [default: the file's name]")
@_platform
@_quiet
@json_option
def load(source: Path | None, base: str, platform: str | None, quiet: bool, as_json: bool) -> None:
    """Take all images of an archive or OCI layout, by the names that they have there."""
    wanted = _parsed(platform)
    images = late.opened().images
    with render.Steps(quiet=quiet) as steps, _source(images, source) as file:
        found = images.load(file, base=base, platform=wanted, progress=steps)
    if as_json:
        render.emit([_tell(image) for image in found])
        return
    for image in found:
        click.echo(image.name)


@verb("save")
@click.argument("names", nargs=-1, required=True, type=IMAGE, metavar="IMAGE...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Instead of standard output.")
@_quiet
def save(names: Sequence[str], output: Path | None, quiet: bool) -> None:
    """Write images into one archive, for load and for `docker load`."""
    if output is None and sys.stdout.isatty():
        raise click.UsageError("an archive is nothing for a terminal: use -o FILE", click.get_current_context(silent=True))
    images = late.opened().images
    with Bars("reading images", quiet=quiet or output is None) as bars:
        images.save(names, sys.stdout.buffer if output is None else output, report=bars)
    sys.stdout.buffer.flush()


@verb("export")
@click.argument("image", type=IMAGE)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--tag", default="", help="What it is called in the layout.  [default: its own tag]")
@click.option("--format", "form", type=click.Choice(["folder", "tar"]), help="[default: by the name: a tar if it ends in .tar]")
@click.option("--oci", is_flag=True, help="An image with Docker's manifest gets OCI's, and another digest.")
@_quiet
@json_option
def export(image: str, target: Path, tag: str, form: str | None, oci: bool, quiet: bool, as_json: bool) -> None:
    """Write an image as an OCI image layout.

    TARGET is a folder: a new one, or a layout that the image is added to; or a tar.
    """
    images = late.opened().images
    with Bars("reading the image", quiet=quiet) as bars:
        digest = images.export(image, target, tag=tag, archive=None if form is None else form == "tar", oci=oci, report=bars)
    if as_json:
        render.emit({"digest": digest, "target": str(target.absolute())})
    else:
        click.echo(digest)
