"""Every verb, on machines with the fake engine: real keeper, real guest program, real commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_support import Cli, states
from machine_home import IMAGE, TestHome

from trivisor.cli import options


def test_a_whole_life(cli: Cli) -> None:
    made = cli("create", "--name", "web", "--memory", "128M", "-l", "team=blue", IMAGE)
    assert made.status == 0 and len(made.out.strip()) == 12
    assert states(cli) == {"web": "created"}
    for verb, state in [("start", "running"), ("pause", "paused"), ("resume", "running"), ("stop", "stopped"), ("start", "running")]:
        done = cli(verb, "web")
        assert (done.status, done.out) == (0, "web\n"), done.err
        assert states(cli) == {"web": state}
    refused = cli("delete", "web")
    assert refused.status == 125
    assert refused.err.splitlines()[1].startswith("hint: delete is legal when")
    assert cli("rm", "-f", made.out.strip()[:6]).status == 0
    assert states(cli) == {}


def test_the_first_failure_ends_the_verb(cli: Cli, web: str) -> None:
    done = cli("pause", web, "nobody", web)
    assert (done.status, done.out) == (125, "web\n")
    assert "nobody" in done.err


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (["--memory", "lots"], "'lots' is not a size"),
        (["--memory", "0"], "more than nothing"),
        (["--cpus", "0"], "cpus must be"),
        (["--cpus", "1000"], "cpus must be"),
        (["--name", "No Good"], "not a DNS label"),
        (["--ttl", "soon"], "not a duration"),
        (["--wall", "container"], "cannot"),
        (["--network", "none", "-p", "8080:80"], "need a network"),
        (["--network", "host"], "cannot share the host's network"),
        (["--cpus", "1.5"], "whole number"),
        (["--io", "speed=1"], "io has no speed"),
    ],
)
def test_wishes_that_cannot_be(cli: Cli, wish: list[str], message: str) -> None:
    done = cli("create", *wish, IMAGE)
    assert done.status == 125
    assert message in done.err
    assert states(cli) == {}


def test_wishes_reach_the_spec(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FROM_US", "yes")
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    words = "create --name a --cpus 2 -m 1G --disk ram -p 8080:80 -e A=1=2 -e FROM_US -e NOT_SET --ttl 2h --idle 90s -l a=b"
    words += " -v cache:/c:ro -v ./here:/h --pids 99 --swap 0 --cpuset 0 --io write-bps=1M --io read-iops=9"
    assert cli(*words.split(), IMAGE).status == 0
    (machine,) = cli("inspect", "a").json
    spec = machine["spec"]
    assert spec["cpus"] == 2 and spec["memory"] == 1 << 30 and spec["disk"] == "ram"
    assert spec["network"] == "nat" and spec["ports"] in ({"8080": 80}, {8080: 80})
    assert spec["env"] == {"A": "1=2", "FROM_US": "yes"}
    here = str(Path.cwd() / "here")
    assert spec["volumes"] == {"/c": {"source": "cache", "readonly": True}, "/h": {"source": here, "readonly": False}}
    assert (spec["pids"], spec["swap"], spec["cpuset"]) == (99, 0, "0")
    assert spec["io"] == {"read_bps": None, "write_bps": 1 << 20, "read_iops": 9, "write_iops": None}
    assert (spec["ttl"], spec["idle"], spec["labels"]) == (7200, 90, {"a": "b"})


def test_unknown_image_has_a_hint(cli: Cli) -> None:
    done = cli("run", "nothing", "true")
    assert done.status == 125
    assert done.err.splitlines()[0].startswith("trivisor: ") and done.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)])
def test_run_passes_the_exit_status_on_and_leaves_nothing(cli: Cli, command: str, status: int) -> None:
    done = cli("run", IMAGE, "--", "sh", "-c", f"echo out; echo err >&2; {command}")
    assert (done.status, done.out, done.err) == (status, "out\n", "err\n")
    assert states(cli) == {}


def test_run_with_wrong_command(cli: Cli) -> None:
    assert cli("run", IMAGE, "no-such-program").status == 127
    assert states(cli) == {}


def test_run_gives_standard_input_if_asked(cli: Cli) -> None:
    payload = os.urandom(300_000).hex().encode()
    assert cli("run", "-i", IMAGE, "cat", stdin=payload).out.encode() == payload
    assert cli("run", IMAGE, "cat", stdin=payload).out == ""


def test_run_detached_runs_its_command(cli: Cli, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert cli("run", "-d", "--name", "bg", IMAGE, "sh", "-c", f"echo done > {fifo}; sleep 100").status == 0
    assert fifo.read_text() == "done\n"
    assert states(cli) == {"bg": "running"}


def test_failed_start_of_a_detached_run_leaves_nothing(cli: Cli, home: TestHome, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_engine import FakeEngine

    monkeypatch.setattr(options.Settings, "vmm", lambda _settings: home.open(FakeEngine(fail="guest answered")))
    assert cli("run", "-d", IMAGE).status == 125
    assert states(cli) == {}


def test_exec(cli: Cli, web: str) -> None:
    done = cli("exec", "-e", "A=1", "-w", "/tmp", web, "sh", "-c", "echo $A $PWD; echo err >&2; exit 3")
    assert (done.status, done.out, done.err) == (3, "1 /tmp\n", "err\n")
    assert cli("exec", "-i", web, "--", "tr", "a-z", "A-Z", stdin=b"loud").out == "LOUD"
    assert cli("exec", web, "sh", "-c", "yes | head -c 20000000").out.count("y") == 10_000_000


def test_exec_with_rules(cli: Cli, web: str) -> None:
    done = cli("exec", "--rule", "mkdir+mkdirat:ENOSPC", "--rule", "sync:kill", web, "sh", "-c", "mkdir /tmp/never; sync; sync")
    assert "No space left" in done.err
    assert done.status == 128 + 31
    wrong = cli("exec", "--rule", "opennat:EIO", web, "true")
    assert wrong.status == 125
    assert "did you mean openat?" in wrong.err
    cannot = cli("exec", "--rule", "write:EIO,after=3", web, "true")
    assert cannot.status == 125
    assert "cannot answer system calls outside of the program" in cannot.err
    assert "these walls can: container" in cannot.err


def test_rules_of_a_machine_are_kept_with_it(cli: Cli) -> None:
    assert cli("create", "--name", "ruled", "--rule", "mkdir+mkdirat:ENOSPC", IMAGE).status == 0
    kept = json.loads(cli("inspect", "ruled").out)
    assert "mkdirat" in json.dumps(kept)
    assert cli("start", "ruled").status == 0
    assert "No space left" in cli("exec", "ruled", "mkdir", "/tmp/never").err
    assert cli("create", "--write", "/tmp", IMAGE).status == 125  # the pretended wall has no Landlock


def test_exec_timeout(cli: Cli, web: str) -> None:
    done = cli("exec", "--timeout", "0.3", web, "sleep", "100")
    assert done.status == 125
    assert "0.3 s" in done.err
    assert states(cli) == {"web": "running"}


def test_exec_detached_prints_the_process(cli: Cli, web: str) -> None:
    pid = cli("exec", "-d", web, "sleep", "100").out.strip()
    assert cli("exec", web, "kill", "-0", pid).status == 0


def test_exec_on_a_terminal_needs_one(cli: Cli, web: str) -> None:
    done = cli("exec", "-it", web, "sh")
    assert done.status == 125
    assert "needs a terminal" in done.err


def test_exec_where_it_does_not_run(cli: Cli) -> None:
    cli("create", "--name", "web", IMAGE)
    done = cli("exec", "web", "true")
    assert done.status == 125
    assert "it is created" in done.err


def test_ps(cli: Cli, web: str) -> None:
    cli("create", "--name", "idle", "-l", "a=b", IMAGE)
    lines = cli("ps").out.splitlines()
    assert lines[0].split()[:5] == ["ID", "NAME", "IMAGE", "WALL", "STATE"]
    assert [line.split()[1] for line in lines[1:]] == ["web"]
    assert [line.split()[1] for line in cli("ps", "-a").out.splitlines()[1:]] == ["web", "idle"]
    assert len(cli("ps", "-aq").out.split()) == 2
    assert [machine["name"] for machine in cli("ps", "-a", "--label", "a=b", "--json").json] == ["idle"]


def test_cp_both_ways(cli: Cli, web: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(b"x" * 100_000)
    there = tmp_path / "machine"
    there.mkdir()
    assert cli("cp", str(tree), f"web:{there}").status == 0
    assert (there / "tree" / "sub" / "file").stat().st_size == 100_000
    assert cli("cp", str(tree / "sub" / "file"), f"web:{there}/other").status == 0
    back = tmp_path / "back"
    back.mkdir()
    assert cli("cp", f"web:{there}/tree", str(back)).status == 0
    assert (back / "tree" / "sub" / "file").read_bytes() == b"x" * 100_000
    assert cli("cp", f"web:{there}/other", str(back / "renamed")).status == 0
    assert (back / "renamed").stat().st_size == 100_000


def test_cp_of_what_is_not_there(cli: Cli, web: str, tmp_path: Path) -> None:
    for words in [("web:/nowhere/at/all", str(tmp_path / "x")), (str(tmp_path / "nothing"), "web:/tmp")]:
        done = cli("cp", *words)
        assert done.status == 125
        assert done.err.startswith("trivisor: ") and "Traceback" not in done.err


def test_inspect_events_stats_logs(cli: Cli, web: str) -> None:
    assert cli("inspect", "web").json[0]["state"] == "running"
    kinds = [json.loads(line)["kind"] for line in cli("events", "--json").out.splitlines()]
    assert kinds[-2:] == ["created", "started"]
    last = json.loads(cli("events", "--json").out.splitlines()[-1])["id"]
    assert cli("events", "--since", str(last)).out == ""
    assert "started" in cli("events").out
    (stats,) = cli("stats", "--json").json
    assert stats["name"] == "web" and stats["stats"]["private"] >= 0
    assert cli("stats", "web").out.splitlines()[0].startswith("NAME")
    for source in ("serial", "init", "engine", "answer", "all"):
        assert cli("logs", "--source", source, "web").status == 0


def test_modify(cli: Cli, web: str) -> None:
    cli("stop", web)
    assert cli("modify", "--memory", "300M", "--dry-run", web).out == "memory 256M to 300M, from its next start on\n"
    assert cli("modify", "--cpus", "2", "-m", "256M", "--json", web).json == [
        {"what": "cpus", "before": 1, "after": 2, "when": "start", "why": "", "note": ""}
    ]
    grown = cli("modify", "--disk", "9G", web)
    assert grown.out.startswith("disk 8G to 9G, from its next start on") or "no disk of its own" in grown.err
    assert cli("inspect", web).json[0]["spec"]["cpus"] == 2
    assert cli("modify", web).out == "nothing changes\n"
    assert cli("modify", "--memory", "much", web).status == 125


def test_wait(cli: Cli, web: str) -> None:
    waited = cli("wait", "--timeout", "0.2", web)
    assert waited.status == 125
    cli("stop", web)
    assert cli("wait", web).status == 0


def test_images(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("text")
    assert cli("images", "import", str(source), "mine").out.startswith("sha256:")
    assert {image["name"] for image in cli("images", "--json").json} >= {"mine:latest"}
    assert "mine:latest" in cli("images", "list").out
    assert cli("images", "rm", "mine").status == 0
    assert "mine" not in cli("images").out
    assert cli("images", "import", str(tmp_path / "none"), "x").status == 2


def test_image_in_use_stays(cli: Cli, web: str) -> None:
    assert cli("images", "rm", IMAGE).status == 125


def test_doctor(cli: Cli) -> None:
    done = cli("doctor")
    assert done.status == 0
    assert "vm: available" in done.out and "container: not available" in done.out
    assert "auto: vm\n" in done.out and "by TCG" in done.out
    found = cli("doctor", "--json").json
    assert [wall["wall"] for wall in found["walls"]] == ["vm", "gvisor", "container"]
    assert found["auto"]["wall"] == "vm"


def test_doctor_says_when_nothing_works(cli: Cli, home: TestHome, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_engine import FakeEngine

    from trivisor.vmm.engine import WallReport

    engine = FakeEngine()
    monkeypatch.setattr(engine, "report", lambda: WallReport(wall="vm", available=False, why="no QEMU", remedy="apt-get install qemu"))
    monkeypatch.setattr(options.Settings, "vmm", lambda _settings: home.open(engine))
    done = cli("doctor")
    assert done.status == 1
    assert "why: no QEMU" in done.out and "remedy: apt-get install qemu" in done.out
    assert "auto: none can be used" in done.out


def test_names_are_completed(cli: Cli, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("create", "--name", "idle", IMAGE)
    for words, found in [("trivisor stop w", ["web"]), ("trivisor exec ", ["idle", "web"]), ("trivisor run tin", ["tiny:latest"])]:
        monkeypatch.setenv("_TRIVISOR_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", "2")
        assert sorted(line.split(",")[1] for line in cli().out.splitlines()) == found


@pytest.mark.parametrize(
    ("words", "message"), [("-v /data", "not SOURCE:PATH"), ("-v a:/x -v b:/x", "two volumes"), ("--io fast", "not KEY=VALUE")]
)
def test_options_that_cannot_be_read(cli: Cli, words: str, message: str) -> None:
    done = cli("create", *words.split(), IMAGE)
    assert done.status == 2
    assert message in done.err


def test_volumes(cli: Cli) -> None:
    assert cli("volume", "create", "one", "two").out == "one\ntwo\n"
    assert cli("volume", "create", "one").status == 125
    assert cli("create", "--name", "a", "-v", "two:/data", IMAGE).status == 0
    assert [(row["name"], row["machines"]) for row in cli("volume", "--json").json] == [("one", []), ("two", ["a"])]
    refused = cli("volume", "rm", "one", "two")
    assert (refused.status, refused.out) == (125, "one\n")
    assert "used by a" in refused.err
    assert cli("delete", "a").status == 0
    assert cli("volume", "rm", "two").status == 0
    assert cli("volume", "list", "--json").json == []
