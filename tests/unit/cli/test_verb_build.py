"""trivisor build, as a user types it; and bars of real pulls and pushes on a real terminal."""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path

import pytest
from cli_support import Cli, argv
from machine_home import IMAGE, TestHome
from registry_server import Registry


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "Containerfile").write_text("FROM scratch AS one\nCOPY a /a\nFROM one\nLABEL l=1\nCOPY --from=one /a /b\n")
    return folder


def test_build(cli: Cli, context: Path) -> None:
    first = cli("build", "-t", "built", "-t", "also:2", "--label", "k=v", str(context))
    assert first.status == 0 and first.out.startswith("sha256:")
    assert first.err.splitlines() == ["[one] 1/1 COPY a /a", "[1] 1/2 LABEL l=1", "[1] 2/2 COPY /a /b"]
    about = cli("inspect", "built").json[0]
    assert about["names"] == ["also:2", "built:latest"] and about["config"]["Labels"] == {"l": "1", "k": "v"}
    again = cli("build", "--json", "-t", "built", "--label", "k=v", str(context))
    assert again.json["digest"] + "\n" == first.out and again.err.count("cached") == 2
    assert "cached" not in cli("build", "--no-cache", str(context)).err
    quiet = cli("build", "-q", "--target", "one", str(context))
    assert quiet.err == "" and quiet.out != first.out


def test_build_from_standard_input(cli: Cli) -> None:
    done = cli("build", "-t", "piped", "-", stdin=b"FROM scratch\nCOPY <<E /x\nhello\nE\n")
    assert done.status == 0 and cli("inspect", "piped").json[0]["digest"] == done.out.strip()
    assert "not there" in cli("build", "-", stdin=b"FROM scratch\nCOPY x /x\n").err


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("FROM scratch\n\nCOPPY a /a", "Containerfile:3: 'COPPY' is no instruction", "did you mean COPY?"),
        ("FROM scratch\nCOPY none /a", "Containerfile:2: COPY: none", "hint: "),
        ('FROM scratch\nCMD ["a"', "Containerfile:2: a JSON array", "double quotes"),
        ("FROM scratch AS a\nCOPY --from=b /a /a\nFROM a AS b", "Containerfile:1: stages need each other in a circle", ""),
        ("FROM scratch\nCOPY ../a /a", "Containerfile:2: COPY: ../a", "hint: "),
        ("FROM scratch\nCOPY --from=7 /a /a", "Containerfile:2: there is no stage 7", "hint: there are 1"),
    ],
)
def test_errors_name_the_line_and_help(cli: Cli, context: Path, text: str, says: str, hint: str) -> None:
    (context / "Containerfile").write_text(text)
    done = cli("build", str(context))
    assert done.status == 125 and done.out == ""
    assert f"trivisor: {says}" in done.err and hint in done.err


def test_a_command_line_without_sense(cli: Cli, context: Path, tmp_path: Path) -> None:
    for words in (["--secret", "src=x"], ["--secret", "id=a,env=NOT_SET_ANYWHERE"], ["--build-arg", "=x"], ["--file", "/none"], []):
        assert cli("build", *words, *([str(context)] if words else [])).status == 2
    assert cli("build", "-t", "NO", str(context)).status == 125
    assert cli("build", "--platform", "a b", str(context)).status == 125
    nowhere = cli("build", str(tmp_path / "none"))
    assert nowhere.status == 125 and "is no folder" in nowhere.err and "hint: " in nowhere.err
    unknown = cli("build", "--wall", "paper", str(context))
    assert unknown.status == 125 and "vm, gvisor, container" in unknown.err


def on_a_terminal(home: TestHome, *words: str) -> str:
    """Run the command line with a terminal as standard error, and return what it showed there."""
    leader, follower = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "DOCKER_CONFIG": str(home.root)}
    shown = b""
    with subprocess.Popen(argv(home, *words), stdout=subprocess.PIPE, stderr=follower, env=environment) as running:
        os.close(follower)
        end = time.monotonic() + 60
        while select.select([leader], [], [], end - time.monotonic())[0]:
            try:
                shown += os.read(leader, 1 << 16)
            except OSError:  # its other end is closed
                break
        assert running.stdout is not None and running.stdout.read().startswith(b"sha256:")
        assert running.wait(60) == 0
    os.close(leader)
    return shown.decode()


def test_bars_of_pull_and_push(home: TestHome, cli: Cli, tmp_path: Path) -> None:
    """One for each layer on a terminal, and a line at the end; no control character elsewhere, and nothing where that is asked for."""
    layer, config = cli("inspect", IMAGE).json[0]["layers"][0]["digest"][7:19], cli("inspect", IMAGE).json[0]["config_digest"][7:19]
    with Registry(tmp_path / "registry") as registry:
        name = f"{registry.host}/app:1"
        pushed = on_a_terminal(home, "push", IMAGE, name)
        assert layer in pushed and config in pushed and "\x1b[" in pushed and "2 blobs, " in pushed.splitlines()[-1]
        assert "\x1b" not in cli("push", IMAGE, f"{registry.host}/other:1").err
        cli("rmi", IMAGE)
        pulled = on_a_terminal(home, "pull", name)
        assert layer in pulled and config in pulled and "\x1b[" in pulled and "2 blobs, " in pulled.splitlines()[-1]
        cli("rmi", name)
        assert on_a_terminal(home, "pull", "-q", name) == ""
        plain = cli("pull", name).err
        assert "\x1b" not in plain and plain.count("already there") == 3
