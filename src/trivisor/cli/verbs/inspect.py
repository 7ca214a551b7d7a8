"""trivisor inspect."""

from __future__ import annotations

from collections.abc import Sequence

from trivisor.cli import render
from trivisor.cli.options import json_option, machines_argument, open_vmm, verb


@verb("inspect")
@json_option
@machines_argument
def command(machines: Sequence[str], as_json: bool) -> None:  # noqa: ARG001 - it is JSON either way; the option is there for scripts
    """Print all that is known of machines, as JSON."""
    vmm = open_vmm()
    render.emit([vmm.get(name).info() for name in machines])
