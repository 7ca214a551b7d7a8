"""The command line's verbs for memory, devices and network, on a machine that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trivisor import Machine
from trivisor.cli import main


def said(capfd: pytest.CaptureFixture[str], home: object, *words: str) -> str:
    """What a command line that must succeed prints."""
    capfd.readouterr()
    status = main.run(["--home", str(home), *words])
    out, err = capfd.readouterr()
    assert status == 0, err
    return out


@pytest.mark.walls("vm", "container")
def test_a_program_s_memory(running: Machine, wall_home: object, capfd: pytest.CaptureFixture[str]) -> None:
    home, name = wall_home.root, running.name  # type: ignore[attr-defined]
    with running.spawn(["sh", "-c", "echo ready; read x"]) as program:
        assert program.stdout.readline() == b"ready\n"
        pid = str(program.pid)
        first = said(capfd, home, "memory", "search", name, "-p", pid, "-x", "7f454c46", "--limit", "1").strip()
        assert said(capfd, home, "memory", "read", name, first, "4", "-p", pid).startswith(f"{int(first, 16):016x}  7f 45 4c 46")
        program.kill()
    (one,) = json.loads(said(capfd, home, "memory", "stats", name, "--json"))
    assert one["memory"]["limit"] and one["memory"]["private"] > 0


@pytest.mark.walls("vm")
def test_a_whole_kernel_s_memory(running: Machine, wall_home: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    home, name = wall_home.root, running.name  # type: ignore[attr-defined]
    listed = json.loads(said(capfd, home, "memory", "ps", name, "--json"))
    assert {1, 2} <= {one["pid"] for one in listed}
    assert "Linux versio" in said(capfd, home, "memory", "read", name, "linux_banner")
    (place, *_) = json.loads(said(capfd, home, "memory", "search", name, "Linux version", "--json"))
    said(capfd, home, "memory", "dump", name, str(tmp_path / "dump"))
    with (tmp_path / "dump").open("rb") as dumped:
        dumped.seek(place)
        assert dumped.read(13) == b"Linux version"
        found = dumped.seek(0, 2)
    with running.memory.view() as view:  # a small machine has one run of memory
        run = len(view)
    assert found == run and (tmp_path / "dump").stat().st_blocks * 512 < found
    assert (tmp_path / "dump").stat().st_mode & 0o777 == 0o600
    assert main.run(["--home", str(home), "memory", "dump", name, str(tmp_path / "dump")]) == main.FAILED


@pytest.mark.walls("vm")
def test_a_disk_comes_and_goes(running: Machine, wall_home: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    home, name = wall_home.root, running.name  # type: ignore[attr-defined]
    (tmp_path / "data.raw").write_bytes(b"here" + bytes(1 << 20))
    assert said(capfd, home, "device", "attach", name, "disk", str(tmp_path / "data.raw"), "--readonly", "--name", "data") == "data\n"
    (one,) = json.loads(said(capfd, home, "device", "list", name, "--json"))
    assert one["device"]["readonly"] and running.exec(["head", "-c", "4", one["node"]]).stdout == b"here"
    said(capfd, home, "device", "detach", name, "data")
    assert json.loads(said(capfd, home, "device", "list", name, "--json")) == []


@pytest.mark.walls("container")
def test_commit(running: Machine, wall_home: object, capfd: pytest.CaptureFixture[str]) -> None:
    home, name = wall_home.root, running.name  # type: ignore[attr-defined]
    running.exec("echo x > /new", check=True)
    words = ["--cmd", '["cat", "/new"]', "-e", "A=b", "-l", "c=d", "-w", "/etc", "-a", "me", "-m", "why"]
    digest = said(capfd, home, "commit", *words, name, "committed").strip()
    (about,) = json.loads(said(capfd, home, "inspect", "committed"))
    assert about["digest"] == digest and about["config"]["Cmd"] == ["cat", "/new"]
    assert json.loads(said(capfd, home, "commit", "--json", name, "committed"))["size"] > 0
    for wrong in (["--cmd", "cat"], ["--cmd", "[1]"], ["-e", "A"]):
        assert main.run(["--home", str(home), "commit", *wrong, name, "committed"]) == 2
    said(capfd, home, "rmi", "committed")
