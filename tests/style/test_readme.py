"""The README's examples do what they say: they are taken out of it and run, in a home of the test's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, "TRIVISOR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_two_commands_are_in_the_makefile() -> None:
    commands = _blocks("sh")[0]
    makefile = (ROOT / "Makefile").read_text()
    assert [line.split()[:2] for line in commands.splitlines()] == [["make", "demo"], ["make", "test"]]
    assert re.search(r"^demo:", makefile, re.MULTILINE) and re.search(r"^test:", makefile, re.MULTILINE)


def test_python_example_is_ten_lines_and_runs(image_home: Path) -> None:
    source = _blocks("python")[0]
    assert len(source.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", source], env=_environment(image_home), capture_output=True, text=True, timeout=170)
    assert (done.returncode, done.stdout.split()) == (0, ["42"]), done.stderr


def test_policy_example_runs(image_home: Path) -> None:
    source = _blocks("python")[1]
    done = subprocess.run([sys.executable, "-c", source], env=_environment(image_home), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Atlantis nautilus\n")
    assert "No space left on device" in done.stdout


def test_copies_example_runs(image_home: Path) -> None:
    source = _blocks("python")[2]
    done = subprocess.run([sys.executable, "-c", source], env=_environment(image_home), capture_output=True, text=True, timeout=170)
    assert (done.returncode, [line.split()[1] for line in done.stdout.splitlines()]) == (0, ["warm", "warm"]), done.stderr


def test_command_line_example_runs(image_home: Path) -> None:
    script = _blocks("sh")[1].splitlines()
    assert script.pop(0) == "trivisor images bootstrap debian"  # the home has it
    done = subprocess.run(
        ["sh", "-ec", "\n".join(script)], env=_environment(image_home), capture_output=True, text=True, timeout=170, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0] == "42"
    assert any(line.startswith("Linux ") for line in lines)
    assert lines[-1] == "web"


def test_six_calls_are_all_there() -> None:
    for call in ("create", "start", "pause", "resume", "stop", "delete"):
        assert f"| `{call}_vm(" in README
