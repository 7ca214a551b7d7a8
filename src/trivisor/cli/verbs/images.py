"""trivisor images: what machines are made from; and the verbs about them that read no files and ask no registry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import click

from trivisor.cli import late, render
from trivisor.cli.groups import group
from trivisor.cli.options import IMAGE, json_option, open_vmm, pairs, verb
from trivisor.cli.verbs import archives, registry
from trivisor.core.errors import NotFound
from trivisor.core.units import format_size, parse_duration


def _list(as_json: bool) -> None:
    images = late.opened().images.list()
    if as_json:
        shown = ("name", "digest", "size", "created", "source", "config")
        render.emit([{**{key: getattr(image, key) for key in shown}, "platform": str(image.platform)} for image in images])
        return
    rows = [(image.name, _short(image.digest), format_size(image.size), render.ago(image.created)) for image in images]
    render.table(("NAME", "DIGEST", "SIZE", "CREATED"), rows)


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


command = group("images", "List images, and all that is done with them.", _list, "List images.")


@verb("ls")
@json_option
def ls(as_json: bool) -> None:
    """List images."""
    _list(as_json)


@verb("bootstrap")
@click.argument("name", default="debian")
@click.option("--suite", default="bookworm", show_default=True, help="Debian release.")
@click.option("--package", "packages", multiple=True, default=["python3-minimal"], show_default=True, help="May be given often.")
def bootstrap(name: str, suite: str, packages: Sequence[str]) -> None:
    """Make an image of Debian, from its package archive."""
    with render.Steps() as steps:
        image = late.opened().images.bootstrap(name, suite, packages, progress=steps)
    click.echo(image.digest)


@verb("tag")
@click.argument("image", type=IMAGE)
@click.argument("name")
def tag(image: str, name: str) -> None:
    """Give an image another name as well."""
    click.echo(late.opened().images.tag(image, name).name)


_force = click.option("-f", "--force", is_flag=True, help="All names of an ID, and the last even if a machine has the image.")


def _remove(names: Sequence[str], force: bool) -> None:
    images = late.opened().images
    for name in names:
        try:
            images.remove(name, force=force)
        except NotFound as error:
            if not force:
                raise
            render.error(str(error))
        else:
            click.echo(name)


@verb("rmi")
@click.argument("names", nargs=-1, required=True, type=IMAGE, metavar="IMAGE...")
@_force
def rmi(names: Sequence[str], force: bool) -> None:
    """Remove images. One that a machine was made from stays."""
    _remove(names, force)


@verb("rm")
@click.argument("names", nargs=-1, required=True, type=IMAGE, metavar="IMAGE...")
@_force
def remove(names: Sequence[str], force: bool) -> None:
    """Remove images. One that a machine was made from stays."""
    _remove(names, force)


@verb("inspect")
@json_option
@click.argument("names", nargs=-1, required=True, type=IMAGE, metavar="IMAGE...")
def inspect(names: Sequence[str], as_json: bool) -> None:  # noqa: ARG001 - it is JSON either way; the option is there for scripts
    """Print all that is known of images, as JSON."""
    images = late.opened().images
    render.emit([images.inspect(name) for name in names])


@verb("history")
@click.argument("image", type=IMAGE)
@click.option("--no-trunc", is_flag=True, help="Print what made each layer in full.")
@json_option
def history(image: str, no_trunc: bool, as_json: bool) -> None:
    """Print how an image came about, the latest step first."""
    images = late.opened().images
    steps, sizes = images.history(image), [layer.size for layer in images.layers(images.get(image).digest)]
    left = iter(sizes)
    told = [
        {"created": step.created, "by": step.created_by, "size": 0 if step.empty_layer else next(left, 0), "comment": step.comment}
        for step in steps
    ]
    told += [{"created": None, "by": "", "size": size, "comment": "no step is told of for this layer"} for size in left]
    told.reverse()
    if as_json:
        render.emit(told)
        return
    rows = [
        (str(one["created"] or "-")[:19], format_size(int(str(one["size"]))), _line(str(one["by"] or one["comment"]), no_trunc))
        for one in told
    ]
    render.table(("CREATED", "SIZE", "BY"), rows)


def _line(text: str, whole: bool) -> str:
    text = " ".join(text.split())
    return text if whole or len(text) <= 80 else text[:77] + "..."


@verb("du")
@click.option("-v", "--verbose", is_flag=True, help="Each image, too: all its bytes, those that no other has, and its unpacked roots.")
@json_option
def du(verbose: bool, as_json: bool) -> None:
    """Print what images take of the disk, and what prune would free."""
    from trivisor.va.build import caches

    vmm = open_vmm()
    usage, mounted = vmm.images.usage(), caches.weigh(vmm)
    size, reclaimable = usage.size + mounted.size, usage.reclaimable + mounted.reclaimable
    if as_json:
        render.emit({**asdict(usage), "caches": asdict(mounted), "size": size, "reclaimable": reclaimable})
        return
    if verbose:
        rows = [
            (
                ", ".join(one.names) or _short(one.digest),
                format_size(one.size),
                format_size(one.own),
                format_size(one.roots),
                len(one.used_by),
            )
            for one in usage.images
        ]
        render.table(("IMAGE", "SIZE", "OWN", "ROOTS", "USED BY"), rows)
        click.echo()
    kinds = [
        ("images", usage.blobs),
        ("build cache", usage.build),
        ("cache mounts", mounted),
        ("roots", usage.roots),
        ("downloads", usage.downloads),
        ("other", usage.rest),
    ]
    table = [(name, share.count, format_size(share.size), format_size(share.reclaimable)) for name, share in kinds]
    render.table(("WHAT", "COUNT", "SIZE", "RECLAIMABLE"), [*table, ("all", "", format_size(size), format_size(reclaimable))])


@verb("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Images that no machine has, too, and all of the build cache.")
@click.option("--older", metavar="TIME", help="Only what came longer ago, such as 24h or 7d.")
@click.option("-l", "--label", multiple=True, metavar="KEY[=VALUE]", help="With --all: only images that have it.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
def prune(everything: bool, older: str | None, label: Sequence[str], dry_run: bool, force: bool, as_json: bool) -> None:
    """Remove what no image and no machine needs.

    That is: blobs without a name, unpacked roots of images that are gone, what interrupted downloads left, and layers in the build
    cache that no image has. What running pulls, builds and machines have stays.
    """
    seconds = parse_duration(older, "--older") if older else 0.0
    labels = {**{one: None for one in label if "=" not in one}, **pairs([one for one in label if "=" in one], "label")}
    if labels and not everything:
        raise click.UsageError("--label chooses images, which --all removes", click.get_current_context(silent=True))
    from trivisor.va.build import caches

    vmm = open_vmm()
    if everything and not force and not dry_run and sys.stdin.isatty():
        click.confirm("Remove every image that no machine has, and the build cache?", abort=True, err=True)
    with render.Steps() as steps:
        steps("looking what is needed")
        pruned = vmm.images.prune(everything=everything, older=seconds, labels=labels, dry_run=dry_run)
        if everything:
            pruned = replace(pruned, freed=pruned.freed + caches.prune(vmm, older=seconds, dry_run=dry_run))
    if as_json:
        render.emit(asdict(pruned))
        return
    for name in pruned.images:
        click.echo(name)
    for why in pruned.kept:
        render.error(why)
    click.echo(f"{'would free' if dry_run else 'freed'} {format_size(pruned.freed)}")


@verb("check")
@json_option
def check(as_json: bool) -> int:
    """Read every blob again, and print what is damaged."""
    with render.Steps() as steps:
        steps("reading every blob")
        damaged = late.opened().images.check()
    return render.faults(damaged, as_json)


_FILES = (archives.import_, archives.export, archives.save, archives.load)
for sub in (ls, bootstrap, tag, remove, inspect, history, du, prune, check, registry.pull, registry.push, *_FILES):
    command.add_command(sub)
