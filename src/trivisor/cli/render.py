"""What the command line prints: tables, JSON, errors, and the progress of long work.

Plain text is made here without a library, since most verbs print a few lines and must start fast; rich is loaded
only for the progress bar of a copy. Text that comes from a machine loses its control characters before it reaches a
terminal, which a hostile guest could otherwise steer.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import click

SLOW = 1.0
"""Seconds after which a step is told of where nobody watches a terminal."""
SLOW_TTY = 0.3

_UNSAFE = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def safe(text: str, *, colours: bool = False) -> str:
    """Return `text` without control characters but newline and tab; with `colours`, SGR sequences stay."""

    def keep(match: re.Match[str]) -> str:
        return match[0] if colours and len(match[0]) > 1 else ""

    return _UNSAFE.sub(keep, text)


def error(message: str, hint: str = "") -> None:
    """Print one line, and a second that says what to do next, on standard error."""
    line = " ".join(safe(message).split())
    click.echo(f"trivisor: {line}", err=True)
    if hint:
        click.echo(f"hint: {' '.join(safe(hint).split())}", err=True)


def emit(value: Any, *, line: bool = False) -> None:
    """Print `value` as JSON: indented for a terminal, unless it is to be a `line`; else on one line."""
    indent = 2 if sys.stdout.isatty() and not line else None
    click.echo(json.dumps(value, indent=indent, default=_plain, ensure_ascii=False))


def faults(found: Sequence[str], as_json: bool) -> int:
    """Print what a check found, a line each, and return the exit status: 1 if there is anything."""
    if as_json:
        emit(found)
    else:
        for line in found:
            click.echo(safe(line))
    return 1 if found else 0


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value, str_keys=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns as wide as their widest cell, three spaces between; the last one is not padded."""
    lines = [list(headers), *([safe(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=False)]
        click.echo("   ".join([*padded, line[-1]]).rstrip())


def ago(when: float) -> str:
    """Return how long ago `when` (seconds since the epoch) was, in its largest unit."""
    seconds = max(0.0, time.time() - when)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit} ago"
    return f"{int(seconds)}s ago"


class Steps:
    """Tells of the steps of long work on standard error: at once enough for a terminal, one line a slow step elsewhere.

    Used as a context manager and called with the words of each step (vmm.engine.Progress). A step that is over
    before anyone would have wondered is not told of. `quiet` silences it.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._shown = False

    def __call__(self, step: str) -> None:
        self._settle()
        if self._quiet:
            return
        if self._tty and self._shown:
            self._show(step)
            return
        self._timer = threading.Timer(SLOW_TTY if self._tty else SLOW, self._show, [step])
        self._timer.daemon = True
        self._timer.start()

    def _show(self, step: str) -> None:
        with self._lock:
            line = safe(step).replace("\n", " ")
            sys.stderr.write(f"\r\x1b[K{line[:100]} ..." if self._tty else f"trivisor: {line}\n")
            sys.stderr.flush()
            self._shown = True

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._settle()
        with self._lock:
            if self._tty and self._shown:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()


@contextmanager
def transfer(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar of bytes on a terminal; the function it gives is told of bytes done and, where known, the total."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(safe(what)), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
