"""trivisor network: how machines are connected, looked at and changed while they run and for their next start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from trivisor.cli import render
from trivisor.cli.groups import group
from trivisor.cli.options import MACHINE, egress_words, json_option, machine_argument, open_vmm, ports, shape_words, verb
from trivisor.core.network import Egress, Shape
from trivisor.core.units import format_size, parse_size
from trivisor.vos.network.decisions import Decision

_WAIT = 0.5
"""Seconds between two looks whether we are to end; Python acts on a signal only between waits."""


def _show(machines: Sequence[str], as_json: bool) -> None:
    vmm = open_vmm()
    chosen = [vmm.get(name).network for name in machines] if machines else [machine.network for machine in vmm.list()]
    named = list(machines) or [machine.name for machine in vmm.list()]
    if as_json:
        render.emit(
            [
                {
                    "machine": name,
                    "network": one.name,
                    "address": one.address,
                    "ports": one.ports,
                    "shape": one.shape,
                    "egress": one.egress,
                    "cut": one.cut_off,
                }
                for name, one in zip(named, chosen, strict=True)
            ]
        )
        return
    rows = [
        (
            name,
            one.name,
            one.address or "-",
            ", ".join(f"{host}:{guest}" for host, guest in one.ports.items()) or "-",
            shaped(one.shape) or "-",
            egress_said(one.egress),
            ", ".join(one.cut_off) or "-",
        )
        for name, one in zip(named, chosen, strict=True)
    ]
    render.table(("MACHINE", "NETWORK", "ADDRESS", "PORTS", "SHAPE", "EGRESS", "CUT OFF FROM"), rows)


command = group(
    "network", "Say how machines are connected; change it.", lambda as_json: _show((), as_json), "List how machines are connected."
)


@verb("list")
@json_option
@click.argument("machines", type=MACHINE, nargs=-1, metavar="[MACHINE...]")
def list_(machines: Sequence[str], as_json: bool) -> None:
    """List how machines are connected.

    All of them if none is named.
    """
    _show(machines, as_json)


@verb("publish")
@machine_argument
@click.argument("port", metavar="[HOST:]GUEST")
def publish(machine: str, port: str) -> None:
    """Publish a TCP port on this host's 127.0.0.1.

    For good. Prints the host's: a free one if none is given.
    """
    ((host, guest),) = ports([port]).items()
    click.echo(open_vmm().get(machine).network.publish(guest, host if ":" in port else 0))


@verb("withdraw")
@machine_argument
@click.argument("port", type=int, metavar="HOST")
def withdraw(machine: str, port: int) -> None:
    """Withdraw a published port.

    Connections through it end.
    """
    open_vmm().get(machine).network.withdraw(port)


@verb("shape")
@machine_argument
@click.argument("words", nargs=-1, metavar="[none|KEY=VALUE...]")
@json_option
def shape(machine: str, words: Sequence[str], as_json: bool) -> None:
    """Print or set rates, latency and loss.

    The keys are rate-in and rate-out (bytes a second, such as 1M), latency (such as 50ms) and loss (0 to 1). What is not given is as it is
    without a shape; "none" takes all of it away.
    """
    network = open_vmm().get(machine).network
    if words:
        network.reshape(**({} if tuple(words) == ("none",) else shape_words(words)))
    if as_json:
        render.emit(network.shape)
    else:
        click.echo(shaped(network.shape) or "none")


@verb("egress")
@machine_argument
@click.argument("allowed", nargs=-1, metavar="[all|none|ALLOWED...]")
@json_option
def egress(machine: str, allowed: Sequence[str], as_json: bool) -> None:
    """Print or set what a machine may talk to.

    ALLOWED are "dns", addresses and ports such as 192.0.2.0/24:443, and names such as pypi.example or *.example.org:443. "none" allows
    nothing, "all" what its network lets it.
    """
    network = open_vmm().get(machine).network
    if tuple(allowed) == ("all",):
        network.unrestrict()
    elif allowed:
        network.restrict(*egress_words(allowed))
    if as_json:
        render.emit(network.egress)
    else:
        click.echo(egress_said(network.egress))


@verb("decisions")
@machine_argument
@json_option
def decisions(machine: str, as_json: bool) -> int:
    """Print what an egress policy decides.

    What it allows and refuses from now on, until Ctrl-C.
    """
    found = open_vmm().get(machine)
    with found.network.decisions() as listening:
        try:
            while found.state.value in ("running", "paused"):
                if (one := listening.read(_WAIT)) is None:
                    continue
                if as_json:
                    render.emit(one, line=True)
                else:
                    click.echo(_line(one))
        except KeyboardInterrupt:
            return 0
    return 0


@verb("cut")
@machine_argument
@click.argument("other", type=MACHINE)
def cut(machine: str, other: str) -> None:
    """Cut two machines off from each other.

    Both must be of one named network.
    """
    open_vmm().get(machine).network.cut(other)


@verb("join")
@machine_argument
@click.argument("other", type=MACHINE)
def join(machine: str, other: str) -> None:
    """Join two machines that were cut off."""
    open_vmm().get(machine).network.join(other)


@verb("capture")
@machine_argument
@click.argument("file")
@click.option("--snaplen", type=int, default=262144, show_default=True, metavar="BYTES", help="How much is kept of each packet.")
@click.option("--most", metavar="SIZE", help="How large the file may become.")
def capture(machine: str, file: str, snaplen: int, most: str | None) -> int:
    """Write packets to a pcap file.

    All that a machine sends and gets, until Ctrl-C or its end. FILE may be "-": standard output.
    """
    path = Path("/dev/stdout" if file == "-" else file)
    network = open_vmm().get(machine).network
    with network.capture(path, snaplen=snaplen, most=None if most is None else parse_size(most)) as running:
        try:
            while not running.wait(_WAIT):
                pass
        except KeyboardInterrupt:
            pass
    click.echo(f"{running.packets} packets, {running.dropped} dropped", err=True)
    return 0


def shaped(shape: Shape) -> str:
    """Return a shape in the words that `shape` takes; "" for none."""
    parts = [f"{key}={format_size(rate)}" for key, rate in (("rate-in", shape.rate_in), ("rate-out", shape.rate_out)) if rate]
    if shape.latency:
        parts.append(f"latency={shape.latency * 1000:g}ms")
    if shape.loss:
        parts.append(f"loss={shape.loss:g}")
    return " ".join(parts)


def egress_said(policy: Egress | None) -> str:
    """Return a policy in the words that `egress` takes."""
    return "all" if policy is None else " ".join(policy.allow) or "none"


def _line(one: Decision) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(one.time))
    where = f"{one.address}:{one.port}" if one.port else one.address
    whom = " ".join(part for part in (one.protocol, where, one.name) if part)
    return render.safe(f"{when}  {'allowed' if one.allowed else 'refused'}  {whom}{f'  {one.reason}' if one.reason else ''}")


for one in (list_, publish, withdraw, shape, egress, decisions, cut, join, capture):
    command.add_command(one)
