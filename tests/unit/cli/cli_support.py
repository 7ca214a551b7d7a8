"""The command line as tests run it: in this process, with the fake engine, its standard streams being real descriptors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from machine_home import TestHome

from trivisor.cli import late, main, options


@dataclass(frozen=True)
class Done:
    """How a command line went."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    """Make descriptor 0 a file that holds `data`, and sys.stdin what reads it."""
    before, stream = os.dup(0), sys.stdin
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        os.dup2(file.fileno(), 0)
    try:
        with open(0, encoding="utf-8", closefd=False) as sys.stdin:
            yield
    finally:
        sys.stdin = stream
        os.dup2(before, 0)
        os.close(before)


class Cli:
    """Call it with the words of a command line."""

    def __init__(self, home: TestHome, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.home = home
        self._capture = capture
        patch.setattr(options.Settings, "vmm", lambda _settings: home.open())
        patch.setattr(late, "opened", home.open)
        for name in PATIENCE:  # what is told of what takes long is no part of what it says, on however busy a host
            patch.setattr(name, 600.0)

    def __call__(self, *words: str, stdin: bytes = b"") -> Done:
        self._capture.readouterr()
        with standard_input(stdin):
            status = main.run(words)
        out, err = self._capture.readouterr()
        return Done(status, out, err)


PATIENCE = ("trivisor.cli.render.SLOW", "trivisor.cli.render.SLOW_TTY", "trivisor.cli.bars.QUIET_FOR")
"""Seconds after which a step, or a transfer, is told of."""
SCRIPT = """
import sys
sys.path[:0] = {path!r}
from fake_engine import FakeEngine
from trivisor.cli import main, options, render
render.SLOW = render.SLOW_TTY = 600.0
from trivisor.vmm.manager import VMM
options.Settings.vmm = lambda settings: VMM(settings.home, engines=[FakeEngine()])
main.main()
"""


def argv(home: TestHome, *words: str) -> list[str]:
    """Return what runs the command line as a process of its own."""
    return [sys.executable, "-c", SCRIPT.format(path=sys.path), "--home", str(home.root), *words]


@contextmanager
def process(home: TestHome, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command line as a process of its own. It is killed if it still runs when a test is done with it."""
    with subprocess.Popen(argv(home, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def states(cli: Cli) -> dict[str, str]:
    """Return the state of each machine by its name."""
    return {machine["name"]: machine["state"] for machine in cli("ps", "-a", "--json").json}
