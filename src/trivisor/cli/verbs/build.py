"""trivisor build: an image from a Containerfile."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from trivisor.cli import late, render
from trivisor.cli.options import json_option, verb
from trivisor.core.errors import BuildFailed
from trivisor.images.model import Platform
from trivisor.images.registry.access import Access
from trivisor.va.build.build import build
from trivisor.va.build.events import BuildEvent
from trivisor.va.build.options import Options


class _Lines:
    """Tells of a build on standard error: a line a step, and what its command says behind the name of its stage."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._lock = threading.Lock()
        self._rest: dict[str, bytes] = {}
        self._cached: set[tuple[str, int]] = set()

    def __call__(self, event: BuildEvent) -> None:
        if self._quiet:
            return
        with self._lock:
            if event.kind == "begin":
                text = " ".join(event.text.split())
                self._say(event, f"{event.step}/{event.steps}", text if len(text) <= 100 else text[:97] + "...")
            elif event.kind == "cached":
                self._cached.add((event.stage, event.step))
            elif event.kind == "output":
                *lines, rest = (self._rest.get(event.stage, b"") + event.data).split(b"\n")
                self._rest[event.stage] = rest[-4096:]
                for line in lines:
                    self._say(event, "|", line.decode(errors="replace"))
            else:
                self._end(event)

    def _end(self, event: BuildEvent) -> None:
        if rest := self._rest.pop(event.stage, b""):
            self._say(event, "|", rest.decode(errors="replace"))
        if (event.stage, event.step) in self._cached:
            self._say(event, f"{event.step}/{event.steps}", "cached")
        elif event.seconds >= render.SLOW_TTY:
            self._say(event, f"{event.step}/{event.steps}", f"done in {event.seconds:.1f} s")

    def _say(self, event: BuildEvent, mark: str, text: str) -> None:
        click.echo(f"[{render.safe(event.stage)}] {mark} {render.safe(text, colours=sys.stderr.isatty())}", err=True)


def _pairs(_: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """Read KEY=VALUE; a KEY alone takes its value from the environment, if it is there."""
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name:
            raise click.BadParameter(f"{value!r} is no NAME=VALUE", param=option)
        if equals:
            found[name] = text
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def _secrets(_: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, Path | str | bytes]:
    found: dict[str, Path | str | bytes] = {}
    for value in values:
        fields = dict(part.partition("=")[::2] for part in value.split(","))
        name = fields.get("id", "")
        source = fields.get("src") or fields.get("source")
        if not name or set(fields) - {"id", "src", "source", "env", "type"}:
            raise click.BadParameter(f"{value!r} is no id=NAME,src=FILE or id=NAME,env=VARIABLE", param=option)
        variable = fields.get("env") or name
        if source:
            found[name] = Path(source).expanduser()
        elif variable in os.environ:
            found[name] = os.environb[variable.encode()]
        else:
            raise click.BadParameter(f"there is no variable {variable}", param=option)
    return found


@verb("build")
@click.argument("context", type=click.Path(path_type=Path))
@click.option(
    "-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Default: Containerfile or Dockerfile in it."
)
@click.option("-t", "--tag", "tags", multiple=True, metavar="NAME", help="What the image is called. May be given often.")
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME[=VALUE]", callback=_pairs, help="The value of an ARG.")
@click.option("--target", default="", metavar="STAGE", help="The stage to build; default: the last.")
@click.option("--wall", default="container", show_default=True, help="vm, gvisor or container: behind which each RUN is carried out.")
@click.option("--network", default="nat", show_default=True, help="Of RUN: nat, none, a network of the home, or host.")
@click.option("--memory", default="1G", show_default=True, help="Of each RUN's machine.")
@click.option("--cpus", type=float, default=1, show_default=True, help="Of each RUN's machine.")
@click.option("--secret", "secrets", multiple=True, metavar="id=NAME,src=FILE", callback=_secrets, help="For RUN --mount=type=secret.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", callback=_pairs, help="A label of the image.")
@click.option("--platform", metavar="OS/ARCH", help="Of the bases that are pulled.")
@click.option("--no-cache", is_flag=True, help="Do all steps anew.")
@click.option("--pull", is_flag=True, help="Ask registries for bases that are here.")
@click.option("--insecure", is_flag=True, help="Registries may speak plain HTTP, or have any certificate.")
@click.option("--timeout", type=float, metavar="SECONDS", help="That each RUN may take.")
@click.option("-q", "--quiet", is_flag=True, help="Print the digest alone.")
@json_option
def command(
    context: Path,
    file: Path | None,
    tags: Sequence[str],
    arguments: dict[str, str],
    target: str,
    wall: str,
    network: str,
    memory: str,
    cpus: float,
    secrets: dict[str, Path | str | bytes],
    labels: dict[str, str],
    platform: str | None,
    no_cache: bool,
    pull: bool,
    insecure: bool,
    timeout: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build an image from a Containerfile.

    COPY takes its files from the folder CONTEXT; with - the Containerfile is read from standard input, and there are no files.
    """
    options = Options(
        arguments=arguments,
        target=target,
        wall=wall,
        network=network,
        memory=memory,
        cpus=cpus,
        secrets=secrets,
        labels=labels,
        platform=Platform.parse(platform) if platform else None,
        use_cache=not no_cache,
        pull=pull,
        timeout=timeout,
        access=Access(insecure=insecure),
        report=_Lines(quiet=quiet),
    )
    with ExitStack() as stack:
        if str(context) == "-":
            context = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trivisor-build-")))
            (context / "Containerfile").write_bytes(sys.stdin.buffer.read())
        try:
            image = build(late.opened(), context, tags, file=file, options=options)
        except BuildFailed as error:
            if quiet:
                click.echo(render.safe(error.output.decode(errors="replace")), err=True)
            raise
    if as_json:
        render.emit({"name": image.name if tags else None, "digest": image.digest, "size": image.size, "tags": list(tags)})
    else:
        click.echo(image.digest)
