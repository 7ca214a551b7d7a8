"""trivisor memory: a budget set, met and taken away; what is held; equal pages."""

from __future__ import annotations

from cli_support import Cli
from machine_home import IMAGE

from trivisor.core.units import MIB


def test_a_budget(cli: Cli, web: str) -> None:
    assert cli("memory", "budget").out == "none\n"
    assert cli("memory", "budget", "384M").out == "384M\n"
    refused = cli("run", "-d", "--memory", "256M", IMAGE)
    assert refused.status == 125
    assert "held by web 256M" in refused.err and "hint: stop or pause" in refused.err
    assert cli("memory", "budget", "256M", "--overcommit", "2").out == "256M, overcommitted 2 times\n"
    listed = cli("memory")
    assert "web" in listed.out and "budget: 256M, overcommitted 2 times; held: 256M" in listed.out
    found = cli("memory", "list", "--json").json
    assert found["budget"] == {"memory": 256 * MIB, "overcommit": 2.0}
    assert [(one["name"], one["state"], one["holds"]) for one in found["machines"]] == [("web", "running", 256 * MIB)]
    assert cli("doctor", "--json").json["memory"]["budget"]["memory"] == 256 * MIB
    assert "budget: 256M, overcommitted 2 times" in cli("doctor").out
    assert cli("memory", "budget", "much").status == 125
    assert cli("memory", "budget", "none").out == "none\n"
    assert cli("run", "-d", "--memory", "256M", IMAGE).status == 0


def test_equal_pages(cli: Cli) -> None:
    said = cli("memory", "dedupe")
    assert said.status == 0 and ("saved" in said.out or "cannot merge" in said.out)
    assert cli("memory", "--json").json["dedupe"].keys() >= {"available", "scanning", "saved"}
    assert cli("memory", "dedupe", "perhaps").status == 2


def test_options_of_memory(cli: Cli) -> None:
    assert cli("create", "--name", "a", "--oom", "stop", "--dedupe", IMAGE).status == 0
    spec = cli("inspect", "a").json[0]["spec"]
    assert (spec["oom"], spec["dedupe"], spec["hugepages"]) == ("stop", True, None)
    assert cli("create", "--oom", "perhaps", IMAGE).status == 2
