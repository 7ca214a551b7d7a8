"""The verbs snapshot, restore, fork, suspend and snapshots, as a user types them."""

from __future__ import annotations

from pathlib import Path

import machine_home
import pytest
from cli_support import Cli
from frozen_engine import FreezingEngine, mind, think
from machine_home import IMAGE, TestHome


@pytest.fixture
def web(cli: Cli, home: TestHome, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A running machine "web", by its folder."""
    monkeypatch.setattr(machine_home, "FakeEngine", FreezingEngine)
    machine = cli("create", "--name", "web", IMAGE).out.strip()
    assert cli("start", "web").status == 0
    folder = home.root / "machines" / machine
    think(folder, b"warm")
    return folder


def test_there_and_back(cli: Cli, home: TestHome, web: Path) -> None:
    assert cli("snapshot", "--tag", "a", "--note", "first", "web", "ready").out == "web@ready\n"
    assert cli("snapshot", "--no-memory", "--json", "web", "files").json["memory"] is False
    assert cli("snapshot", "web", "ready").status == 125
    think(web, b"cold")
    assert cli("restore", "web", "ready").out == "web\n"
    assert mind(web) == b"warm"
    assert cli("fork", "-n", "2", "web").out == "web-1\nweb-2\n"
    assert [one["name"] for one in cli("fork", "--json", "--name", "kid", "web").json] == ["kid"]
    assert cli("suspend", "web", "kid").out == "web\nkid\n"
    assert {line.split()[0] for line in cli("ps", "-a").out.splitlines() if "suspended" in line}
    assert cli("resume", "web").out == "web\n"
    assert mind(web) == b"warm"
    done = cli("create", "--snapshot", "web@ready", "--name", "again")
    assert done.err == ""
    made = done.out.strip()
    assert cli("start", "again").status == 0
    assert mind(home.root / "machines" / made) == b"warm"
    assert cli("create").status == 2 and cli("create", "--snapshot", "web@none").status == 125


def test_run_from_one(cli: Cli, home: TestHome, web: Path) -> None:
    """The command runs where the snapshot stands, as it is given; the machine is deleted when it has ended."""
    assert cli("snapshot", "web", "ready").status == 0
    think(web, b"cold")
    done = cli("run", "--snapshot", "web@ready", "--name", "kid", "-e", "A=b", "--", "sh", "-c", "echo $A; exit 7")
    assert (done.status, done.out, done.err) == (7, "b\n", "")
    assert cli("run", "--snapshot", "web@ready", "true").status == 0
    made = cli("run", "-d", "--snapshot", "web@ready").out.strip()
    assert mind(home.root / "machines" / made) == b"warm"
    assert cli("run", "-d", "--snapshot", "web@ready", "--", "sleep", "99").status == 0
    assert cli("ps", "-q").out.count("\n") == 3
    for words in (["run"], ["run", "--snapshot", "web@ready", IMAGE, "--", "true"], ["run", "-P", "--snapshot", "web@ready", "true"]):
        assert cli(*words).status == 2
    assert cli("run", "--snapshot", "web@none", "true").status == 125
    refused = cli("run", "--memory", "1G", "--snapshot", "web@ready", "true")
    assert refused.status == 125 and "memory is as the snapshot web@ready has it" in refused.err


def test_ports_of_one_from_one(cli: Cli, web: Path) -> None:
    """Those of the snapshot on free ones of the host, or those that are asked for; its network is the snapshot's."""
    assert cli("create", "--name", "net", "-p", "8080:80", IMAGE).status == 0
    assert cli("start", "net").err == "" and cli("snapshot", "net", "ready").err == ""
    assert cli("create", "--snapshot", "net@ready", "--name", "kid", "-p", "8081:80").err == ""
    assert cli("create", "--snapshot", "net@ready", "--name", "other").err == ""
    told = {one["name"]: one["spec"] for one in cli("inspect", "kid", "other").json}
    assert (told["kid"]["ports"], told["kid"]["network"]) == ({"8081": 80}, "nat")
    assert list(told["other"]["ports"].values()) == [80] and "8080" not in told["other"]["ports"]


def test_what_is_done_with_them(cli: Cli, web: Path, tmp_path: Path) -> None:
    assert cli("snapshots").out.split() == ["SNAPSHOT", "WALL", "HAS", "SIZE", "TAKEN", "TAGS", "NOTE"]
    for name in ("one", "two"):
        cli("snapshot", "web", name)
    assert [line.split()[:3] for line in cli("snapshots", "ls").out.splitlines()[1:]] == [
        ["web@one", "vm", "memory"],
        ["web@two", "vm", "memory"],
    ]
    assert cli("snapshots", "set", "--note", "n", "--tag", "t", "--keep", "--ttl", "0", "web@one").out == "web@one\n"
    told = cli("snapshots", "inspect", "web@one").json
    assert (told["note"], told["tags"], told["keep"], told["expires"]) == ("n", ["t"], True, None)
    assert cli("snapshots", "tree").out == "web@one memory #t\n  web@two memory  <- web\n"
    (top,) = cli("snapshots", "tree", "--json").json
    assert [child["snapshot"] for child in top["children"]] == ["web@two"]
    assert len(cli("snapshots", "du").out.splitlines()) == 4
    assert len(cli("snapshots", "du", "--json").json["snapshots"]) == 2
    assert cli("snapshots", "check").status == 0
    assert cli("snapshots", "export", "web@one", str(tmp_path / "file")).out == f"{tmp_path}/file\n"
    assert cli("snapshots", "import", str(tmp_path / "file"), "web@three").out == "web@three\n"
    assert cli("snapshots", "import", "--json", str(tmp_path / "file"), "web@one").status == 125
    assert "web@two" in cli("snapshots", "prune", "--all", "--dry-run").out
    assert set(cli("snapshots", "prune", "-a", "--json").json["snapshots"]) == {"web@two", "web@three"}
    assert cli("snapshots", "budget").out == "none\n"
    assert cli("snapshots", "budget", "1G").out == "1G\n"
    assert cli("snapshots", "budget", "--json", "none").json == {"max_bytes": None}
    assert cli("snapshots", "rm", "web@one").out == "web@one\n"
    assert cli("snapshots", "--json").json == []
    assert cli("snapshots", "rm", "web@one").status == 125
