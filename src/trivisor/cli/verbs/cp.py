"""trivisor cp: cp(1) with one end in a machine."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import click

from trivisor.cli import render
from trivisor.cli.options import open_vmm, verb
from trivisor.core.errors import FileError
from trivisor.vos.files import Files

_REMOTE = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*):(.*)", re.DOTALL)


@verb("cp")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.argument("source", metavar="MACHINE:PATH|LOCAL")
@click.argument("target", metavar="LOCAL|MACHINE:PATH")
@click.pass_context
def command(ctx: click.Context, source: str, target: str, quiet: bool) -> None:
    """Copy files between a machine and this host.

    A folder is copied with all that is in it. As with cp(1): into a target that is a folder, else to that name. Write
    ./a:b for a local name with a colon.
    """
    from_machine, to_machine = _REMOTE.fullmatch(source), _REMOTE.fullmatch(target)
    if (from_machine is None) == (to_machine is None):
        raise click.UsageError("one of the two is MACHINE:PATH, the other a path of this host", ctx)
    vmm = open_vmm()
    with render.transfer(f"{source} to {target}", quiet=quiet) as progress:
        if from_machine:
            name, path = from_machine.groups()
            vmm.get(name).files.download(path or ".", _into_local(path, target), progress=progress)
        elif to_machine:
            name, path = to_machine.groups()
            files = vmm.get(name).files
            files.upload(source, _into_remote(files, source, path or "."), progress=progress)


def _into_local(remote: str, local: str) -> str:
    name = posixpath.basename(posixpath.normpath(remote or "."))
    return str(Path(local, name)) if Path(local).is_dir() and name not in ("", ".", "..") else local


def _into_remote(files: Files, local: str, remote: str) -> str:
    name = Path(local).absolute().name
    try:
        folder = files.stat(remote).type == "folder"
    except FileError:
        folder = remote.endswith("/")
    return posixpath.join(remote, name) if folder and name else remote
