"""trivisor exec."""

from __future__ import annotations

from typing import Any

import click

from trivisor.cli.attach import Joined, run_joined
from trivisor.cli.options import machine_argument, open_vmm, pairs, policy, rule_options, verb


@verb("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Give our standard input to the command.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait for it; print its process id in the machine.")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Environment of the command.")
@click.option("-w", "--workdir", default="", metavar="FOLDER", help="Where the command runs.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Whom the command runs as.  [default: the image's, else root]")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds, after which it is killed.")
@rule_options
@machine_argument
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    machine: str,
    argv: tuple[str, ...],
    interactive: bool,
    tty: bool,
    detach: bool,
    env: tuple[str, ...],
    workdir: str,
    user: str,
    timeout: float | None,
    **rules: Any,
) -> int:
    """Run a command in a running machine.

    Our exit status is the command's: 127 if there is no such command, 128 + n if signal n killed it.
    """
    words = list(argv[1:] if argv[0] == "--" else argv)
    if not words:
        raise click.UsageError("Missing argument 'COMMAND...'.", ctx)
    if detach and (interactive or tty or timeout is not None):
        raise click.UsageError("-d goes with none of -i, -t and --timeout: nobody waits for the end", ctx)
    found = open_vmm().get(machine)
    variables = pairs(env, "environment", inherit=True)
    calls = policy(rules)
    if detach:
        process = found.spawn(words, detach=True, env=variables, cwd=workdir, user=user, policy=calls)
        click.echo(process.pid)
        return 0
    how = Joined(interactive=interactive, tty=tty, cwd=workdir, user=user, env=variables, timeout=timeout, policy=calls)
    return run_joined(found, words, how)
