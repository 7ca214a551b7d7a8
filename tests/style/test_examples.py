"""What the documents show of system calls does what they say: taken out of them and run, in a home of the test's."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor.cli import main, options

DOCS = Path(__file__).parents[2] / "docs"
TEXTS = [(DOCS / name).read_text() for name in ("syscalls.md", "trace.md")]
COMMANDS = re.findall(r"^    (trivisor .*\S)|`(trivisor trace [^`]*)`", "".join(TEXTS), re.MULTILINE)


def run(home: VmHome, document: str, number: int) -> str:
    """Run a document's Python example and return what it printed."""
    source = re.findall(r"^```python\n(.*?)^```", (DOCS / document).read_text(), re.MULTILINE | re.DOTALL)[number]
    environment = {**os.environ, "TRIVISOR_HOME": str(home.root)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rules_of_syscalls(wall_home: VmHome) -> None:
    said = run(wall_home, "syscalls.md", 0)
    assert said.startswith("5 /data/log\n")
    assert "No space left on device" in said and "touch: cannot touch '/etc/x': Permission denied" in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64: it has a call by number")
def test_handlers_of_syscalls(wall_home: VmHome) -> None:
    assert run(wall_home, "syscalls.md", 1) == "made by Python\n Atlantis\nyou asked for 192.0.2.1:7\n\n\n"


def test_trace(wall_home: VmHome) -> None:
    said = run(wall_home, "trace.md", 0)
    assert re.search(r"^\d+ /nowhere$", said, re.MULTILINE)
    assert re.search(r"^1 ", said, re.MULTILINE), "the exit status of cat"
    assert re.search(r"^.*\d+.*\bopenat\b", said, re.MULTILINE) and "execve" in said


@pytest.mark.parametrize("line", [either or other for either, other in COMMANDS])
def test_commands_are_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    with main.cli.make_context("trivisor", words) as root:
        command = main.cli.get_command(root, words[0])
        assert command is not None
        with command.make_context(words[0], words[1:], parent=root) as context:
            given = dict(context.params)
            assert given["argv"][0] == "--" and len(given["argv"]) > 1
            assert (options.policy(given) is not None) == ("--rule" in words)
