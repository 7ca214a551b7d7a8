"""A test suite of two workers: what it leaves is found in the end, and a test that wants to be alone is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import workers

CONFTEST = """\
import os, subprocess, sys, time
import host_state, pytest, workers

# Others run machines meanwhile, and kill keepers: only what these tests leave is looked for.
host_state._OURS, host_state._named = (), set

def pytest_configure(config):
    config.addinivalue_line("markers", "alone:")
    config.pluginmanager.register(workers.Session(float(os.environ["PATIENCE"])))

@pytest.fixture
def note(request, tmp_path):
    \"""Write down when a test begins and ends.\"""
    with open(os.environ["NOTES"], "a", buffering=1) as notes:
        notes.write(f"+{request.node.nodeid}\\n")
        yield
        notes.write(f"-{request.node.nodeid}\\n")
"""
LEAVES = """\
def test_leaves_a_process(tmp_path):
    import subprocess
    subprocess.run("sleep 1000 &", shell=True, stdout=open(tmp_path / "open", "w"))
"""
ALONE = """\
import os, time
from pathlib import Path
import pytest

def test_meets_the_other(note):
    \"\"\"Of two files one each: both are begun before one ends.\"\"\"
    (Path(os.environ["NOTES"]).parent / f"{Path(__file__).stem}-came").touch()
    deadline = time.monotonic() + 30
    while len(list(Path(os.environ["NOTES"]).parent.glob("*-came"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)

@pytest.mark.parametrize("number", range(20))
def test_one_of_many(note, number):
    time.sleep(0.01)

@pytest.mark.alone
def test_alone(note):
    time.sleep(0.1)
"""


ALONE_ID = "test_first.py::test_alone"


def suite(folder: Path, *options: str, patience: float = 5.0, **files: str) -> tuple[int, str]:
    """Run the tests in `files`; return the exit status and what was printed."""
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(Path(workers.__file__).parent), "NOTES": str(folder / "notes"), "PATIENCE": str(patience)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, "--basetemp", folder / "base", *options]
    done = subprocess.run([*command, folder], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [(), ("-n2",)], ids=["one process", "two workers"])
def test_what_is_left_is_an_error_that_names_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, said = suite(tmp_path / "suite", *options, patience=0.2, leaves=LEAVES, other="def test_other(): pass")
    left = {int(pid): command.strip() for pid, command in re.findall(r"^process (\d+): (.*)", said, re.MULTILINE)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert list(left.values()) == ["sleep 1000"], said
    assert "2 passed, 1 error in" in said.splitlines()[-1]


def test_nothing_left_and_one_test_was_alone(tmp_path: Path) -> None:
    status, said = suite(tmp_path / "suite", "-n2", first=ALONE, second=ALONE.replace("@pytest.mark.alone\n", ""))
    assert status == pytest.ExitCode.OK, said
    assert said.splitlines()[-1].startswith("44 passed in")
    running: set[str] = set()
    together = []
    for note in (tmp_path / "suite/notes").read_text().split():
        (running.add if note.startswith("+") else running.discard)(note[1:])
        together.append(set(running))
    assert len(together) == 88
    assert {len(names) for names in together if ALONE_ID in names} == {1}
