"""Verbs that have verbs of their own: what such a group lists is what it does by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from trivisor.cli.options import home_option, json_option, verb


class _Group(click.Group):
    """A group whose `list` is also found as `ls`, which fingers know."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, "list" if cmd_name == "ls" else cmd_name)


def group(name: str, summary: str, show: Callable[[bool], None], shown: str) -> click.Group:
    """Make a group that calls `show` (whether as JSON) alone and for its verb `list`; `summary` and `shown` are the two's help."""

    @click.group(name, cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}, help=summary)
    @home_option
    @json_option
    @click.pass_context
    def command(ctx: click.Context, as_json: bool) -> None:
        if ctx.invoked_subcommand is None:
            show(as_json)

    @verb("list", help=shown)
    @json_option
    def list_(as_json: bool) -> None:
        show(as_json)

    command.add_command(list_)
    return command


def each(names: Sequence[str], work: Callable[[str], object]) -> None:
    """Do it for each of the names, and print the name when it is done."""
    for name in names:
        work(name)
        click.echo(name)
