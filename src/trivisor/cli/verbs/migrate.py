"""trivisor migrate and receive: a machine goes on in another home, and comes from one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, machine_argument, open_vmm, ports, verb
from trivisor.core.units import format_size

if TYPE_CHECKING:
    from trivisor.vmm.migration.source import MigrationProgress

_TOKEN = "TRIVISOR_MIGRATION_TOKEN"  # noqa: S105 - the name of a variable
_UNIX = "unix:"
_FILE = click.Path(exists=True, dir_okay=False)
_OPTIONS: tuple[Callable[[Callable[..., object]], Callable[..., object]], ...] = (
    click.option("--token-file", type=_FILE, help=f"What both sides know; or ${_TOKEN}."),
    click.option("--cert", type=_FILE, help="Our certificate (PEM), with --key and --authority."),
    click.option("--key", type=_FILE, help="Its key."),
    click.option("--authority", type=_FILE, help="What the other's certificate must be from."),
    click.option("--plain", is_flag=True, help="TCP with neither: no secrecy, no proof of who it is."),
)


def _access_options(function: Callable[..., object]) -> Callable[..., object]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _access(address: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `_access_options` out and return the keywords of migrate and receive."""
    from trivisor.vmm.migration.transport import Tls

    token_file, plain = options.pop("token_file"), options.pop("plain")
    files = [options.pop(name) for name in ("cert", "key", "authority")]
    if any(files) and not all(files):
        raise click.UsageError("--cert, --key and --authority go together")
    if all(files):
        return {"tls": Tls(*files)}
    if plain or address.startswith(_UNIX):
        return {"plain": True} if plain else {}
    token = Path(token_file).read_text().strip() if token_file else os.environ.get(_TOKEN, "")
    return {"token": token} if token else {}


@verb("migrate")
@_access_options
@click.option("--downtime", type=float, default=0.3, show_default=True, help="Seconds that it may stand still.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds after which it stays.")
@click.option("--rate", metavar="SIZE", help="Bytes a second at most, such as 50M.")
@click.option("--no-throttle", is_flag=True, help="Do not slow down a machine that changes its memory faster than that is sent.")
@json_option
@machine_argument
@click.argument("address")
def migrate(machine: str, address: str, downtime: float, timeout: float, no_throttle: bool, as_json: bool, **options: Any) -> None:
    """Move a running machine to another home, where `trivisor receive` waits.

    ADDRESS is HOST:PORT or unix:/PATH. Its programs go on there; here it is gone then. Ctrl-C lets it stay.
    """
    access = _access(address, options)
    moving = open_vmm().get(machine)
    with render.Steps() as steps:
        done = moving.migrate(
            address,
            **access,
            downtime=downtime,
            timeout=timeout,
            rate=options["rate"],
            throttle=not no_throttle,
            progress=lambda progress: steps(_words(progress)),
        )
    if as_json:
        render.emit({"machine": moving.name, "to": address, "downtime": done.downtime, "seconds": done.seconds})
    else:
        click.echo(f"{moving.name}: moved in {done.seconds:.1f} s, in which it stood still for {done.downtime or 0:.2f} s")


@verb("receive")
@_access_options
@click.option("--name", help="What it is called here.  [default: as there]")
@click.option("-p", "--publish", multiple=True, metavar="HOST:GUEST", help="Ports that it publishes here.  [default: as there]")
@click.option("--timeout", type=float, help="Seconds to wait for it.  [default: no end]")
@click.argument("address")
def receive(address: str, name: str | None, publish: tuple[str, ...], timeout: float | None, **options: Any) -> None:
    """Wait for one machine that `trivisor migrate` moves here; print its name.

    ADDRESS is HOST:PORT (port 0: a free one) or unix:/PATH. Over TCP, a token is made and printed if none is given.
    """
    from trivisor.vmm.migration.transport import new_token

    access = _access(address, options)
    made = ""
    if not access and not address.startswith(_UNIX):
        made = access["token"] = new_token()

    def listening(where: str) -> None:
        click.echo(f"trivisor: waiting at {where}" + (f" with the token {made}" if made else ""), err=True)

    with render.Steps() as steps:
        published = ports(publish) if publish else None
        arrived = open_vmm().receive(address, **access, name=name, ports=published, timeout=timeout, listening=listening, progress=steps)
    click.echo(arrived.name)


def _words(progress: MigrationProgress) -> str:
    if progress.phase not in ("image", "disk", "memory"):
        return {"connect": "preparing the other side", "handover": "handing it over", "done": "done"}[progress.phase]
    said = f"sending its {progress.phase}: {format_size(progress.done)}"
    if progress.phase == "memory":
        said += f", {format_size(progress.remaining)} left"
    else:
        said += f" of {format_size(progress.total)}"
    said += f", {format_size(int(progress.rate))} a second" if progress.rate else ""
    return said + (f", {progress.expected:.2f} s of standing still" if progress.expected is not None else "")
