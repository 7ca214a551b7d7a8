"""trivisor trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

from trivisor.cli.options import json_option, machine_argument, open_vmm, pairs, policy, rule_options, verb
from trivisor.vos.syscalls.events import Event, text, to_json
from trivisor.vos.syscalls.perfetto import Perfetto
from trivisor.vos.syscalls.trace import Filter, Trace

_FILE = click.Path(dir_okay=False, path_type=Path)


@verb("trace", context_settings={"allow_interspersed_args": False})
@click.option("-e", "--calls", multiple=True, metavar="CALL[,...]", help="Trace only these calls.  [default: all]")
@click.option("-p", "--pid", "pids", multiple=True, type=int, metavar="N", help="Print only events of this process or thread.")
@click.option("--error", "errors", multiple=True, metavar="ERRNO[,...]", help="Print only calls that failed with one of these.")
@click.option("--failed", is_flag=True, help="Print only calls that failed.")
@click.option("-c", "--count", is_flag=True, help="Print counts and time by call at the end, and no events.")
@json_option
@click.option("--perfetto", type=_FILE, metavar="FILE", help="Write a file for ui.perfetto.dev, and print no events.")
@click.option("-o", "--output", type=_FILE, metavar="FILE", help="Write there what would be printed.")
@click.option("-s", "--buffer", type=click.IntRange(0, 4096), default=64, metavar="BYTES", help="Of a buffer, at most.  [default: 64]")
@click.option("--no-vdso", is_flag=True, help="Have programs find no vDSO, so that clock reads are calls.")
@click.option("-i", "--interactive", is_flag=True, help="Give our standard input to the command.")
@click.option("--env", multiple=True, metavar="KEY[=VALUE]", help="Environment of the command.")
@click.option("-w", "--workdir", default="", metavar="FOLDER", help="Where the command runs.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Whom the command runs as.  [default: the image's, else root]")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds, after which it is killed.")
@rule_options
@machine_argument
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
@click.pass_context
def command(ctx: click.Context, /, machine: str, argv: tuple[str, ...], **given: Any) -> int:
    """Run a command in a running machine and print its system calls.

    Events go to standard error, or with --json to standard output, one a line, and what the command prints to standard error. Our exit
    status is the command's.
    """
    words = list(argv[1:] if argv[0] == "--" else argv)
    if not words:
        raise click.UsageError("Missing argument 'COMMAND...'.", ctx)
    keep = Filter.make(pids=given["pids"], errors=_names(given["errors"]), failed=given["failed"])
    with ExitStack() as stack:
        out = _Out.open(stack, given)
        aside = given["as_json"] and not given["output"]
        trace = (
            open_vmm()
            .get(machine)
            .syscalls.trace(
                words,
                _names(given["calls"]),
                keep=keep,
                no_vdso=given["no_vdso"],
                buffer=given["buffer"],
                env=pairs(given["env"], "environment", inherit=True),
                cwd=given["workdir"],
                user=given["user"],
                stdin=sys.stdin.buffer if given["interactive"] else b"",
                timeout=given["timeout"],
                on_stdout=_writer(sys.stderr if aside else sys.stdout),
                on_stderr=_writer(sys.stderr),
                policy=policy(given),
            )
        )
        stack.enter_context(trace)
        for event in trace:
            out.add(event)
        out.end(trace)
        return trace.exit_code or 0


def _names(values: Sequence[str]) -> list[str]:
    return [name for value in values for name in value.split(",") if name]


def _writer(file: IO[str]) -> Callable[[bytes], None]:
    """Return what writes the command's own output, as it comes."""

    def write(part: bytes) -> None:
        file.buffer.write(part)  # type: ignore[attr-defined]
        file.flush()

    return write


@dataclass
class _Out:
    """Where events go, and as what."""

    file: IO[str]
    as_json: bool
    count: bool
    perfetto: Perfetto | None

    @classmethod
    def open(cls, stack: ExitStack, given: dict[str, Any]) -> _Out:
        file = sys.stdout if given["as_json"] else sys.stderr
        if given["output"]:
            file = stack.enter_context(given["output"].open("w", encoding="utf-8"))
        drawn = None
        if given["perfetto"]:
            drawn = stack.enter_context(Perfetto(stack.enter_context(given["perfetto"].open("w", encoding="utf-8"))))
        return cls(file, given["as_json"], given["count"], drawn)

    def add(self, event: Event) -> None:
        if self.perfetto:
            self.perfetto.add(event)
        elif not self.count:
            self._line(to_json(event) if self.as_json else text(event))

    def end(self, trace: Trace) -> None:
        if self.count:
            self._line(json.dumps(trace.summary.to_dict()) if self.as_json else trace.summary.table())
        elif self.perfetto and trace.summary.lost:
            self._line(f"{trace.summary.lost} events were lost")

    def _line(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()
