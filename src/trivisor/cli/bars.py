"""Blobs on their way, as a user sees them: a bar for each and one for all on a terminal, else a line for each as it is done."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from trivisor.cli import render
from trivisor.core.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from trivisor.images.registry.crew import Progress

_WORDS = {"exists": "already there", "queued": "waiting for its turn", "waiting": "another pull has it"}
_PAST = {"downloading": "downloaded", "uploading": "uploaded", "writing": "written"}
QUIET_FOR = 5.0
"""Seconds after which, without a terminal, a line says how far it all is."""


class Bars:
    """Told of blobs (`report=` of pull, push, export, save). Until the first one it tells what is waited for (`what`)."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what = what
        self._quiet = quiet
        self._steps = render.Steps(quiet=quiet)
        self._tty = sys.stderr.isatty()
        self._rich: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._blobs: dict[str, Progress] = {}
        self._past: dict[str, str] = {}
        self._told = self._begun = time.monotonic()

    def __enter__(self) -> Self:
        self._steps.__enter__()
        self._steps(self._what)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._steps.__exit__(kind, error, trace)
        if self._rich is not None:
            self._rich.stop()
        if self._blobs and error is None and not self._quiet:
            there = sum(event.state == "exists" for event in self._blobs.values())
            took = f"{time.monotonic() - self._begun:.1f} s{f', {there} already there' if there else ''}"
            self._line(f"{len(self._blobs)} blobs, {format_size(self._sum('total'))}, in {took}")

    def __call__(self, event: Progress) -> None:
        if not self._blobs:
            self._steps.__exit__(None, None, None)
        before = self._blobs.get(event.digest)
        if event.state in _PAST:
            self._past[event.digest] = _PAST[event.state]
        self._blobs[event.digest] = event
        if self._quiet:
            return
        if self._tty:
            self._draw(event)
        elif before is not None and (event.state in ("done", "exists", "waiting")) and before.state != event.state:
            self._line(f"{_short(event)}: {self._word(event)}{'' if event.state == 'waiting' else ', ' + format_size(event.total)}")
        elif time.monotonic() - self._told > QUIET_FOR:
            self._line(f"{format_size(self._sum('done'))} of {format_size(self._sum('total'))}")

    def _word(self, event: Progress) -> str:
        if event.state == "done":
            return self._past.get(event.digest, "done")
        return _WORDS.get(event.state, event.state)

    def _sum(self, what: str) -> int:
        return sum(getattr(event, what) for event in self._blobs.values())

    def _line(self, text: str) -> None:
        self._told = time.monotonic()
        click.echo(f"trivisor: {text}", err=True)

    def _draw(self, event: Progress) -> None:
        if self._rich is None:
            self._rich = _bars()
            self._tasks[""] = self._rich.add_task("all", total=None, state="")
        if event.digest not in self._tasks:
            self._tasks[event.digest] = self._rich.add_task(_short(event), total=event.total, state="")
        self._rich.update(self._tasks[event.digest], completed=event.done, total=event.total, state=self._word(event))
        self._rich.update(self._tasks[""], completed=self._sum("done"), total=self._sum("total"))
        if event.state != "queued":
            self._rich.start()  # each blob is there by now; a second time does nothing


def _short(event: Progress) -> str:
    return event.digest.removeprefix("sha256:")[:12]


def _bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:>12}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    return Progress(*columns, TextColumn("{task.fields[state]}"), console=Console(stderr=True), transient=True)
