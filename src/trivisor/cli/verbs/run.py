"""trivisor run: a machine for one command, or with -d one that stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trivisor.cli import render
from trivisor.cli.attach import Joined, run_joined
from trivisor.cli.options import IMAGE, open_vmm, snapshot_option, spec_options, verb, wishes
from trivisor.core.errors import InvalidSpec
from trivisor.core.spec import HOST_IMAGE
from trivisor.vmm.machine import Machine


def _share_folder(options: dict[str, Any], home: Path) -> str:
    """Add our working folder, read-only, to the volumes of a machine on the host's root; return it, "" if it is not shared."""
    from trivisor.images import host

    here = Path.cwd()
    if any(here.is_relative_to(folder) for folder in host.folders(hidden=home)):
        return str(here)  # it is there as it is
    if why := host.withheld(here, home):
        click.echo(f"trivisor: {here} is not shared: {why} (-v .:/work:ro shares it, -w chooses where to run)", err=True)
        return ""
    options["volume"] = (*options["volume"], f"{here}:{here}:ro")
    return str(here)


def _argv(machine: Machine, words: Sequence[str], entrypoint: str | None, snapshot: str | None) -> list[str]:
    """Return what is to be run; nothing if neither the image nor the command line says it."""
    if snapshot is not None and entrypoint is None:  # in it the image's program has its place, or had none
        return list(words)
    try:
        return machine.command(words or None, entrypoint)
    except InvalidSpec:
        if words or entrypoint:
            raise
        return []


def _named(image: str, argv: tuple[str, ...], snapshot: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the image, "" if there is a snapshot in its place, and the command's words. The first of both is given as `image`."""
    if snapshot is not None and argv[:1] != ("--",):
        return "", (image, *argv) if image else ()
    if bool(image) == (snapshot is not None):
        raise click.UsageError("one of IMAGE and --snapshot is given", click.get_current_context())
    if argv and argv[0].startswith("-") and argv[0] != "--":
        raise click.UsageError(f"{argv[0]} stands behind the image, where the command begins", click.get_current_context())
    return image, argv[1:] if argv[:1] == ("--",) else argv


@verb("run", context_settings={"allow_interspersed_args": False})
@spec_options
@snapshot_option
@click.option("-d", "--detach", is_flag=True, help="Leave the machine running, print its id.")
@click.option("--rm", is_flag=True, help="Delete the machine at the end: so it is without -d anyway.")
@click.option("-i", "--interactive", is_flag=True, help="Give our standard input to the command.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-w", "--workdir", default="", metavar="FOLDER", help="Where the command runs.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Whom the command runs as.  [default: the image's, else root]")
@click.option("--entrypoint", metavar="PROGRAM", help="Instead of the image's; an empty one: none. The image's cmd is left out.")
@click.argument("image", type=IMAGE, required=False, default="")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def command(
    image: str,
    argv: tuple[str, ...],
    snapshot: str | None,
    detach: bool,
    rm: bool,
    interactive: bool,
    tty: bool,
    workdir: str,
    user: str,
    entrypoint: str | None,
    **options: Any,
) -> int:
    """Run a command in a new machine.

    COMMAND is given to the image's entrypoint, if it has one; without it the image's own is run, and if there is none a shell. The machine
    is deleted when the command has ended, and our exit status is the command's (128 + n if signal n killed it). With -d the machine stays,
    the command is its program and writes to its log. The image "host" is this host's own programs (container, gvisor), with the folder you
    are in, read-only.

    With --snapshot there is no image: what ran then goes on, and COMMAND is run as it stands; without one a shell is, with -d nothing.
    """
    if detach and (interactive or tty or rm):
        raise click.UsageError(
            "-d goes with none of -i, -t and --rm: nobody waits for the end (--ttl bounds its life)", click.get_current_context()
        )
    image, words = _named(image, argv, snapshot)
    vmm = open_vmm()
    if image == HOST_IMAGE and not workdir:
        workdir = _share_folder(options, vmm.home)
    wanted = wishes(options, snapshot)
    how = Joined(interactive=interactive, tty=tty, cwd=workdir, user=user)
    if detach:
        with render.Steps() as steps:
            machine = vmm.create(image, snapshot=snapshot, **wanted)
            try:
                machine.start(progress=steps)
                if whole := _argv(machine, words, entrypoint, snapshot):
                    machine.launch(whole, "", cwd=workdir, user=user)
            except BaseException:
                machine.delete(force=True)
                raise
        click.echo(machine.id)
        return 0
    with render.Steps() as steps:
        running = vmm.run(image, snapshot=snapshot, progress=steps, **wanted)
    with running as machine:
        return run_joined(machine, _argv(machine, words, entrypoint, snapshot) or ["/bin/sh"], how)
