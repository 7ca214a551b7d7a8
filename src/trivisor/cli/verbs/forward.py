"""trivisor forward."""

from __future__ import annotations

import signal

import click

from trivisor.cli.options import machine_argument, open_vmm, ports, verb


@verb("forward")
@machine_argument
@click.argument("port", metavar="[HOST:]GUEST")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address of this host to listen on.")
def command(machine: str, port: str, address: str) -> int:
    """Forward a port of this host to a port in a machine.

    Needs no network in the machine. Host port 0, or none: a free one is chosen. Goes on until Ctrl-C.
    """
    ((host, guest),) = ports([port]).items()
    found = open_vmm().get(machine)
    with found.forward(guest, host_port=host if ":" in port else 0, host=address) as forward:
        click.echo(f"{address}:{forward.port} -> {found.name}:{guest}")
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0
