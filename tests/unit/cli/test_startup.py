"""What a command line loads: verbs about images, and builds that find all their steps, do without what runs machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from machine_home import IMAGE, TestHome

SCRIPT = """
import sys
from trivisor.cli import main
assert main.run(sys.argv[1:]) == 0
slow = {"trivisor.vmm.manager", "trivisor.vmm.machine", "trivisor.vos.line", "urllib3", "http.client", "rich"} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize(
    "words", [["images"], ["tag", IMAGE, "other"], ["history", IMAGE], ["build", "-t", "again", "CONTEXT"], ["--help"]]
)
def test_what_is_loaded(home: TestHome, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context/Containerfile").write_text(f"FROM {IMAGE}\nCOPY <<E /x\nhello\nE\nWORKDIR /w\nLABEL a=b\n")
    words = [str(tmp_path / "context") if word == "CONTEXT" else word for word in words]
    done = subprocess.run([sys.executable, "-c", SCRIPT, "--home", str(home.root), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
