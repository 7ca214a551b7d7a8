"""trivisor commit: an image of what a machine wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from trivisor.cli import render
from trivisor.cli.options import MACHINE, json_option, open_vmm, pairs, verb


def _array(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Read an array of words, as Containerfiles have it."""
    if value is None:
        return None
    try:
        words = json.loads(value)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise click.BadParameter(f'{value!r} is no JSON array of words, such as \'["serve", "-v"]\'', context, parameter)
    return words


@verb("commit")
@click.argument("machine", type=MACHINE)
@click.argument("name")
@click.option("--entrypoint", metavar="JSON", callback=_array, help="What it runs, such as '[\"serve\"]'; [] for nothing.")
@click.option("--cmd", metavar="JSON", callback=_array, help="What that is given, or what it runs where there is no entrypoint.")
@click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="Over the environment that its image has. May be given often.")
@click.option("-l", "--label", multiple=True, metavar="KEY=VALUE", help="Over the labels that its image has. May be given often.")
@click.option("-u", "--user", help="As whom it runs.")
@click.option("-w", "--workdir", help="Where it runs.")
@click.option("--stop-signal", metavar="SIGNAL", help="What tells its program to end.")
@click.option("-a", "--author", default="", help="Who made it.")
@click.option("-m", "--message", default="", help="Why; for `trivisor history`.")
@json_option
def command(
    machine: str,
    name: str,
    env: Sequence[str],
    label: Sequence[str],
    workdir: str | None,
    author: str,
    message: str,
    as_json: bool,
    **more: Any,
) -> None:
    """Make an image of a machine's image and what it wrote.

    While the machine runs it stands still for that. What lies in volumes is not in it.
    """
    given = {"env": pairs(env, "environment") or None, "labels": pairs(label, "label") or None, "working_dir": workdir, **more}
    config = {key: value for key, value in given.items() if value is not None}
    image = open_vmm().get(machine).commit(name, config=config, author=author, message=message)
    if as_json:
        render.emit({"name": image.name, "digest": image.digest, "size": image.layers[-1].size})
    else:
        click.echo(image.digest)
