"""CI runs what everybody runs, and leaves no wall out: where one cannot be tried, that is a failure there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from missing import lacks

ROOT = Path(__file__).parents[2]


def test_what_is_missing_is_said_and_in_ci_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs runsc"):
        lacks("needs runsc")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs runsc"):
        lacks("needs runsc")


def test_ci_runs_make_test_and_says_that_it_is_ci(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$PWD $* $CI"\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CI": ""}
    done = subprocess.run([ROOT / ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ROOT} test true\n"
