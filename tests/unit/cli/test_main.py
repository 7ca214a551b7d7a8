"""The edge of the command line: exit statuses, one line and a hint, no traceback, nothing heavy before it is needed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from cli_support import Done

from trivisor.cli import main, options
from trivisor.core.errors import NotFound, StorageError

RUN = "from trivisor.cli.main import main; main()"


def trivisor(*words: str, env: dict[str, str] | None = None, **settings: object) -> Done:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
        **settings,  # type: ignore[call-overload]
    )
    return Done(done.returncode, done.stdout, done.stderr)


def broken(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_settings: options.Settings) -> None:
        raise error

    monkeypatch.setattr(options.Settings, "vmm", fail)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from trivisor.cli.main import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stderr.split()
    assert not {"rich", "msgspec", "sqlite3", "zstandard", "trivisor.vmm.manager", "trivisor.vos.processes"} & set(loaded)


def test_verbs_that_show_no_bar_do_not_load_rich(tmp_path: object) -> None:
    code = f"import sys; from trivisor.cli.main import run; run(['--home', {str(tmp_path)!r}, 'ps']); print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stderr.split()
    assert "rich" not in loaded


def test_no_arguments_shows_help_as_a_mistake() -> None:
    done = trivisor()
    assert done.status == 2
    assert "Verbs:" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["ps", "--fly"],
        ["start"],
        ["exec", "web"],
        ["create"],
        ["--home"],
        ["run", "-d", "-it", "debian"],
        ["cp", "a", "b"],
        ["cp", "a:b", "c:d"],
    ],
)
def test_a_command_line_without_sense_is_status_2(words: list[str]) -> None:
    done = trivisor(*words)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("trivisor: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("wish", [["-p", "http"], ["-p", "80:x"], ["-p", "80:1", "-p", "80:2"], ["-e", "=1"], ["-l", "a"]])
def test_malformed_pairs_are_status_2(wish: list[str], tmp_path: object) -> None:
    done = trivisor("--home", str(tmp_path), "create", *wish, "debian")
    assert (done.status, done.out) == (2, "")


def test_error_is_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, NotFound("there is no\nmachine \x1b[31mweb\x07", hint="look\nelsewhere"))
    assert main.run(["ps"]) == 125
    out, err = capsys.readouterr()
    assert (out, err) == ("", "trivisor: there is no machine web\nhint: look elsewhere\n")


@pytest.mark.parametrize("error", [RuntimeError("bad day"), KeyError("k"), AssertionError()])
def test_a_defect_is_one_line_too(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, error)
    monkeypatch.delenv("TRIVISOR_DEBUG", raising=False)
    assert main.run(["ps"]) == 125
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) == 2 and "TRIVISOR_DEBUG" in err


def test_debug_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, RuntimeError("bad day"))
    monkeypatch.setenv("TRIVISOR_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main.run(["ps"])


def test_interrupt_is_130_and_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, KeyboardInterrupt())
    assert main.run(["ps"]) == 130
    assert capsys.readouterr() == ("", "")


def test_os_error_names_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, PermissionError(13, "Permission denied", "/some/file"))
    assert main.run(["ps"]) == 125
    assert capsys.readouterr().err == "trivisor: /some/file: Permission denied\n"


def test_a_home_that_is_a_file(tmp_path: object) -> None:
    file = os.path.join(str(tmp_path), "file")
    with open(file, "w"):
        pass
    done = trivisor("--home", file, "ps")
    assert done.status in (2, 125)
    assert "Traceback" not in done.err


def test_storage_error_reaches_the_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, StorageError("the disk is full", hint="make room"))
    assert main.run(["ps"]) == 125
    assert "hint: make room" in capsys.readouterr().err


def test_reader_that_goes_away_is_no_error() -> None:
    words = [sys.executable, "-c", RUN, "completion", "bash"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(30) in (0, 128 + signal.SIGPIPE)
    assert error == b""


def test_version_and_home_may_stand_after_the_verb(tmp_path: object) -> None:
    assert re.match(r"trivisor \d+\.\d+", trivisor("--version").out) or trivisor("--version").status
    assert trivisor("ps", "--home", str(tmp_path), "--json").out.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    done = trivisor("completion", shell)
    assert done.status == 0
    assert "_TRIVISOR_COMPLETE" in done.out


def test_completion_of_verbs() -> None:
    done = trivisor(env={"_TRIVISOR_COMPLETE": "bash_complete", "COMP_WORDS": "trivisor resu", "COMP_CWORD": "1"})
    assert [line.split(",")[1] for line in done.out.splitlines()] == ["resume"]
