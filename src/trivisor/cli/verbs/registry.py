"""trivisor pull, trivisor push: images from registries and to them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from trivisor.cli import late, render
from trivisor.cli.bars import Bars
from trivisor.cli.options import IMAGE, json_option, verb

if TYPE_CHECKING:
    from trivisor.images.registry.credentials import Credentials

_LARGEST = 64 << 10
"""Bytes of a password: tokens of clouds are some kilobytes."""
_OPTIONS: tuple[Callable[[Callable[..., object]], Callable[..., object]], ...] = (
    click.option("--insecure", is_flag=True, help="The registry may speak plain HTTP, or have any certificate."),
    click.option("-u", "--username", help="Who you are there.  [default: as the Docker config says]"),
    click.option("--password-stdin", is_flag=True, help="Read the password from standard input; else you are asked."),
    click.option("-q", "--quiet", is_flag=True, help="Print the digest alone."),
    json_option,
)


def _access(function: Callable[..., object]) -> Callable[..., object]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def credentials(username: str | None, password_stdin: bool) -> Credentials | None:
    """Return those of the command line, None if it names nobody. Raises click.UsageError."""
    from trivisor.images.registry.credentials import Credentials

    if username is None:
        if password_stdin:
            raise click.UsageError("--password-stdin needs --username", click.get_current_context(silent=True))
        return None
    if password_stdin:
        # One byte more than is taken: what is cut would be refused as wrong.
        data = sys.stdin.buffer.read(_LARGEST + 1)
        password = data.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if not password or len(data) > _LARGEST:
            raise click.UsageError("there is no password on standard input", click.get_current_context(silent=True))
        return Credentials(username, password)
    if not sys.stdin.isatty():
        raise click.UsageError(
            "there is no terminal to ask for a password on: use --password-stdin", click.get_current_context(silent=True)
        )
    return Credentials(username, click.prompt("Password", hide_input=True, err=True))


@verb("pull")
@click.argument("name")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Of an image for several.  [default: this host's]")
@_access
def pull(name: str, platform: str | None, insecure: bool, username: str | None, password_stdin: bool, quiet: bool, as_json: bool) -> None:
    """Get an image from its registry."""
    from trivisor.images.model import Platform
    from trivisor.images.reference import Reference

    wanted = Platform.parse(platform) if platform else None
    registry = Reference.parse(name).registry
    login = credentials(username, password_stdin)
    images = late.opened().images
    with Bars(f"asking {registry} for {name}", quiet=quiet) as bars:
        image = images.pull(name, platform=wanted, credentials=login, insecure=insecure, report=bars)
    if as_json:
        render.emit(
            {"name": image.name, "digest": image.digest, "size": image.size, "platform": str(image.platform), "source": image.source}
        )
    else:
        click.echo(image.digest)


@verb("push")
@click.argument("image", type=IMAGE)
@click.argument("target", required=False)
@_access
def push(image: str, target: str | None, insecure: bool, username: str | None, password_stdin: bool, quiet: bool, as_json: bool) -> None:
    """Send an image to a registry.

    That of its name, or of TARGET, which is what it is called there.
    """
    from trivisor.images.reference import Reference

    images = late.opened().images
    to = Reference.parse(target or images.get(image).name)
    login = credentials(username, password_stdin)
    with Bars(f"asking {to.registry}", quiet=quiet) as bars:
        digest = images.push(image, str(to), credentials=login, insecure=insecure, report=bars)
    if as_json:
        render.emit({"name": str(to), "digest": digest})
    else:
        click.echo(digest)
