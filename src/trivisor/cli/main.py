"""The entry of the command line: finds the verb, and is the one edge where errors become text and an exit status."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from trivisor.cli import render
from trivisor.cli.options import home_option
from trivisor.cli.table import ALIASES, VERBS
from trivisor.core.errors import TrivisorError

FAILED = 125
"""Our own failure, apart from any status a command in a machine may end with (docker's choice)."""
NAME = "trivisor"
COMPLETE = "_TRIVISOR_COMPLETE"
"""Set by the scripts of `trivisor completion`: what is to be completed, and for which shell."""
INTERRUPTED = 128 + signal.SIGINT


class Verbs(click.Group):
    """A group that imports a verb when it is asked for, and lists them from the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(ALIASES.get(cmd_name, cmd_name))
        if verb is None:
            return None
        command: click.Command = getattr(importlib.import_module(verb.module), verb.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


@click.group(
    "trivisor",
    cls=Verbs,
    no_args_is_help=True,
    subcommand_metavar="VERB [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@home_option
@click.version_option(package_name="trivisor", message="trivisor %(version)s")
def cli() -> None:
    """Computers for programs: machines that are made, run, paused and thrown away."""


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """End by the same way as an exception, so that what was begun is taken back."""
    raise SystemExit(128 + number)


def _unknown(error: Exception) -> int:
    """Report what no part of ours translated: a defect, of which a user sees one line."""
    render.error(f"internal error: {type(error).__name__}: {error}", "set TRIVISOR_DEBUG=1 to see where it comes from")
    return FAILED


def _invoke(arguments: Sequence[str]) -> int:
    """Do what the words say. Not click's own main(), which has its own mind on Ctrl-C and on readers that go away."""
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, NAME, COMPLETE, instruction)
    with cli.make_context(NAME, list(arguments)) as context:
        status = cli.invoke(context)
        return status if isinstance(status, int) else 0


def _run(arguments: Sequence[str]) -> int:
    try:
        return _invoke(arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        where = f"{error.ctx.command_path} --help" if error.ctx else "trivisor --help"
        render.error(error.format_message(), f"see {where}")
        return error.exit_code
    except click.ClickException as error:
        render.error(error.format_message())
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except SystemExit as end:  # a signal's (_terminate)
        return end.code if isinstance(end.code, int) else 0


def run(arguments: Sequence[str]) -> int:
    """Run the command line `arguments` and return its exit status."""
    if os.environ.get("TRIVISOR_DEBUG") == "1":
        return _run(arguments)
    try:
        return _run(arguments)
    except TrivisorError as error:
        render.error(str(error), error.hint)
        return FAILED
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, and the flush at exit must not say it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        render.error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return FAILED
    except Exception as error:
        return _unknown(error)


def main() -> NoReturn:
    """Run and exit: the console script."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    sys.exit(run(sys.argv[1:]))
