"""trivisor trace: what goes where, as what, and with which exit status."""

from __future__ import annotations

import json
from pathlib import Path

from cli_support import Cli


def test_text_goes_beside_the_output(cli: Cli, web: str) -> None:
    done = cli("trace", "-e", "openat,execve", web, "--", "sh", "-c", "echo out; cat /nowhere; exit 3")
    assert (done.status, done.out) == (3, "out\n")
    assert '"/nowhere", O_RDONLY) = -1 ENOENT (No such file or directory)' in done.err
    assert "+++ exited with 3 +++" in done.err
    done = cli("trace", "-e", "openat", "--error", "ENOENT", web, "cat", "/nowhere")
    assert all("ENOENT" in line for line in done.err.splitlines() if line.startswith("["))


def test_json_lines(cli: Cli, web: str) -> None:
    done = cli("trace", "--json", "-e", "openat", web, "sh", "-c", "echo out; cat /nowhere")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert {"exec", "call", "exit"} <= {event["event"] for event in events}
    assert [event["error"] for event in events if event["event"] == "call" and event["args"]["pathname"] == "/nowhere"] == ["ENOENT"]
    assert "out\n" in done.err
    counts = cli("trace", "--json", "-c", "-e", "openat", web, "cat", "/nowhere")
    assert json.loads(counts.out)["calls"]["openat"]["errors"] >= 1


def test_counts_and_files(cli: Cli, web: str, tmp_path: Path) -> None:
    table, drawn = tmp_path / "table", tmp_path / "drawn"
    done = cli("trace", "-c", "-o", str(table), web, "true")
    assert (done.status, done.err) == (0, "")
    assert table.read_text().splitlines()[-1].endswith("total")
    assert cli("trace", "--perfetto", str(drawn), web, "true").status == 0
    assert any(part["name"] == "execve" for part in json.loads(drawn.read_text())["traceEvents"])


def test_what_is_wrong(cli: Cli, web: str) -> None:
    done = cli("trace", "-e", "opnat", web, "true")
    assert done.status == 125
    assert "did you mean openat" in done.err
    assert cli("trace", "--error", "ENOPE", web, "true").status == 125
    assert cli("trace", web).status == 2
    assert cli("trace", web, "--").status == 2
