"""trivisor version."""

from __future__ import annotations

import platform

import click

from trivisor.cli import render
from trivisor.cli.options import json_option, verb
from trivisor.core.version import version


@verb("version")
@json_option
def command(as_json: bool) -> None:
    """Print versions."""
    versions = {"trivisor": version(), "python": platform.python_version(), "kernel": platform.release()}
    if as_json:
        render.emit(versions)
        return
    for name, number in versions.items():
        click.echo(f"{name} {number}")
