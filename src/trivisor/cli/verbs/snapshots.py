"""trivisor snapshots: what was frozen under names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivisor.cli import render
from trivisor.cli.groups import each, group
from trivisor.cli.options import SNAPSHOT, json_option, open_vmm, verb
from trivisor.core.units import format_size

if TYPE_CHECKING:
    from trivisor.vmm.snapshots.model import Snapshot
    from trivisor.vmm.snapshots.tree import Branch

_ref = click.argument("snapshot", type=SNAPSHOT, metavar="MACHINE@NAME")


def shown(one: Snapshot) -> dict[str, Any]:
    """Return a snapshot as JSON has it."""
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(one)
    return found


def _list(as_json: bool) -> None:
    found = open_vmm().snapshots.list()
    if as_json:
        render.emit([shown(one) for one in found])
        return
    rows = [
        (
            one.ref,
            one.wall,
            "memory" if one.memory else "files",
            format_size(one.size),
            render.ago(one.created),
            " ".join(one.tags),
            one.note,
        )
        for one in found
    ]
    render.table(("SNAPSHOT", "WALL", "HAS", "SIZE", "TAKEN", "TAGS", "NOTE"), rows)


command = group("snapshots", "List snapshots, and all that is done with them.", _list, "List snapshots, the oldest first.")


@verb("inspect")
@_ref
def inspect(snapshot: str) -> None:
    """Print all that is known of a snapshot, as JSON."""
    render.emit(shown(open_vmm().snapshots.get(snapshot)))


@verb("rm")
@click.argument("snapshots", nargs=-1, required=True, type=SNAPSHOT, metavar="MACHINE@NAME...")
def remove(snapshots: Sequence[str]) -> None:
    """Remove snapshots. What machines need of one goes with the last of them."""
    each(snapshots, open_vmm().snapshots.remove)


@verb("set")
@click.option("--note", help="Another note.")
@click.option("--tag", "tags", multiple=True, help="Its tags from now on; may be given often.")
@click.option("--keep/--no-keep", default=None, help="Whether nothing but `snapshots rm` removes it.")
@click.option("--ttl", metavar="TIME", help="Remove it after this long from now; 0: never.")
@json_option
@_ref
def change(snapshot: str, note: str | None, tags: Sequence[str], keep: bool | None, ttl: str | None, as_json: bool) -> None:
    """Change what is said of a snapshot, and how long it is kept."""
    wish = 0 if ttl == "0" else ttl
    one = open_vmm().snapshots.change(snapshot, note=note, tags=tags or None, keep=keep, ttl=wish)
    render.emit(shown(one)) if as_json else click.echo(one.ref)


@verb("tree")
@json_option
def tree(as_json: bool) -> None:
    """Print which snapshot came after which, and where machines stand."""
    found = open_vmm().snapshots.tree()
    if as_json:
        render.emit([_plain(branch) for branch in found])
        return
    for branch in found:
        for line in branch.lines():
            click.echo(render.safe(line))


def _plain(branch: Branch) -> dict[str, Any]:
    top: dict[str, Any] = {}
    todo = [(branch, top)]
    while todo:
        one, into = todo.pop()
        children: list[dict[str, Any]] = [{} for _ in one.children]
        into |= {"snapshot": one.snapshot.ref, "machines": [*one.machines], "children": children}
        todo += zip(one.children, children, strict=True)
    return top


@verb("diff")
@json_option
@click.argument("first", type=SNAPSHOT)
@click.argument("second", type=SNAPSHOT)
def diff(first: str, second: str, as_json: bool) -> None:
    """Print which files, and how many pages of memory, a second snapshot has otherwise than a first."""
    found = open_vmm().snapshots.diff(first, second)
    if as_json:
        render.emit(found)
        return
    marks = {"added": "+", "changed": "~", "removed": "-"}
    rows = [(marks[one.how], _bytes(one.before), _bytes(one.after), f"/{one.path}") for one in found.files]
    if rows:
        render.table(("", "BEFORE", "AFTER", "FILE"), rows)
    if found.pages is not None:
        click.echo(f"{found.pages} pages of memory")


def _bytes(size: int | None) -> str:
    return "" if size is None else format_size(size)


@verb("du")
@json_option
def du(as_json: bool) -> None:
    """Print what snapshots take of the disk, alone and together."""
    total = open_vmm().snapshots.du()
    if as_json:
        render.emit(total)
        return
    rows = [
        (one.ref, format_size(one.own), format_size(one.shared), format_size(one.plain), ", ".join(one.machines)) for one in total.snapshots
    ]
    render.table(("SNAPSHOT", "OWN", "SHARED", "LAID OUT", "MACHINES"), rows)
    bound = "" if total.max_bytes is None else f" of {format_size(total.max_bytes)}"
    whole = total.packs + total.plain + total.other
    said = f"packs {format_size(total.packs)}, laid out {format_size(total.plain)}, suspended and forked {format_size(total.other)}"
    click.echo(f"{format_size(whole)}{bound}: {said}")


@verb("prune")
@click.option("--max", "most", metavar="SIZE", help="Until all take this or less.  [default: the budget, if there is one]")
@click.option("-a", "--all", "everything", is_flag=True, help="All that no machine needs and that is not kept.")
@click.option("-n", "--dry-run", is_flag=True, help="Say it, and do nothing.")
@json_option
def prune(most: str | None, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what no machine needs, the least lately used first."""
    done = open_vmm().snapshots.prune(max_bytes=most, everything=everything, dry_run=dry_run)
    if as_json:
        render.emit(done)
        return
    for ref in done.snapshots:
        click.echo(ref)
    click.echo(f"{'would free' if dry_run else 'freed'} {format_size(done.freed)}")


@verb("budget")
@click.argument("size", required=False, metavar="[SIZE|none]")
@json_option
def budget(size: str | None, as_json: bool) -> None:
    """Print, or set, what all snapshots of the home may take of the disk."""
    snapshots = open_vmm().snapshots
    if size is not None:
        snapshots.max_bytes = None if size == "none" else size
    found = snapshots.max_bytes
    render.emit({"max_bytes": found}) if as_json else click.echo("none" if found is None else format_size(found))


@verb("check")
@json_option
def check(as_json: bool) -> int:
    """Read every byte that is kept. The exit status is 1 if something is damaged."""
    return render.faults(open_vmm().snapshots.check(), as_json)


@verb("export")
@_ref
@click.argument("file", type=click.Path(path_type=Path))
def export(snapshot: str, file: Path) -> None:
    """Write a snapshot into one file, for another home. Its image is not in it."""
    open_vmm().snapshots.export(snapshot, file)
    click.echo(str(file))


@verb("import")
@json_option
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("name", required=False, metavar="[MACHINE@NAME]")
def import_(file: Path, name: str | None, as_json: bool) -> None:
    """Take a snapshot from a file. What cannot run here is refused."""
    one = open_vmm().snapshots.import_(file, name)
    render.emit(shown(one)) if as_json else click.echo(one.ref)


for one in (inspect, remove, change, tree, diff, du, prune, budget, check, export, import_):
    command.add_command(one)
