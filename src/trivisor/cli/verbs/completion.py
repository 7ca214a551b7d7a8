"""trivisor completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from trivisor.cli.options import verb


@verb("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(trivisor completion bash)" in ~/.bashrc. It completes verbs, options, and the names of machines
    and images.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "trivisor", "_TRIVISOR_COMPLETE")
    # Not script.source(): for bash that first runs bash to see its version, which 4.4 (2016) settled.
    click.echo(script.source_template % script.source_vars())
