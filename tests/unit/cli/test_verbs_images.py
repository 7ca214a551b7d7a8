"""The verbs about images, as a user types them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import Cli, process
from machine_home import IMAGE, TestHome
from registry_server import Registry

from trivisor.cli.bars import Bars
from trivisor.images.registry.crew import Progress


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry"), login=("me", "secret")) as registry:
        yield registry


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Docker config without any login."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker/config.json"


LOGIN = ("--username", "me", "--password-stdin")


def test_push_and_pull(cli: Cli, registry: Registry, nobody: Path) -> None:
    name = f"{registry.host}/team/app:1"
    digest = cli("push", *LOGIN, IMAGE, name, stdin=b"secret\n").out.strip()
    assert digest.startswith("sha256:")
    pulled = cli("pull", *LOGIN, "--json", name, stdin=b"secret")
    assert pulled.json["digest"] == digest and pulled.json["name"] == name
    assert "already there" in pulled.err and "2 blobs" in pulled.err
    assert cli("rmi", name, IMAGE).status == 0
    done = cli("pull", *LOGIN, name, stdin=b"secret")
    assert done.out == digest + "\n" and "downloaded" in done.err
    again = cli("images", "pull", "-q", *LOGIN, name, stdin=b"secret")
    assert (again.out, again.err) == (digest + "\n", "")


def test_login_from_the_docker_config_and_without(cli: Cli, registry: Registry, nobody: Path) -> None:
    name = f"{registry.host}/team/config:1"
    refused = cli("push", IMAGE, name)
    assert refused.status == 125 and "log" in refused.err.splitlines()[-1]
    nobody.parent.mkdir()
    nobody.write_text(json.dumps({"auths": {registry.host: {"auth": "bWU6c2VjcmV0"}}}))
    assert cli("push", "-q", IMAGE, name).status == 0
    assert cli("pull", "-u", "me", name).status == 2, "there is no terminal to ask on"
    assert cli("pull", "--password-stdin", name, stdin=b"secret").status == 2
    assert cli("pull", *LOGIN, name, stdin=b"").status == 2
    missing = cli("pull", f"{registry.host}/team/none")
    assert missing.status == 125 and missing.err.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize("name", ["NO", "a b", "x@sha256:12", "http://registry.example/app"])
def test_what_is_no_name(cli: Cli, name: str) -> None:
    done = cli("pull", name)
    assert done.status == 125 and "is not the name of an image" in done.err and "hint: " in done.err


def test_save_and_load(cli: Cli, tmp_path: Path) -> None:
    assert cli("tag", IMAGE, "other:2").out == "other:2\n"
    digest = cli("inspect", "other:2").json[0]["digest"]
    assert cli("save", "-q", "-o", str(tmp_path / "saved.tar"), IMAGE, "other:2").status == 0
    assert cli("rmi", IMAGE, "other:2").status == 0
    assert sorted(cli("load", "-i", str(tmp_path / "saved.tar")).out.split()) == ["other:2", f"{IMAGE}:latest"]
    assert cli("load", "--json", stdin=(tmp_path / "saved.tar").read_bytes()).json[0]["digest"] == digest


def test_save_to_standard_output_is_the_archive_alone(home: TestHome) -> None:
    import subprocess

    from cli_support import argv

    done = subprocess.run(argv(home, "save", IMAGE), capture_output=True, timeout=60, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "manifest.json" in archive.getnames()


def test_export_and_import(cli: Cli, tmp_path: Path) -> None:
    exported = cli("export", IMAGE, str(tmp_path / "layout"))
    assert "written" in exported.err
    assert cli("import", str(tmp_path / "layout"), "again").out == exported.out
    told = cli("export", "--json", "--format", "tar", "--tag", "v1", "again", str(tmp_path / "file")).json
    assert told == {"digest": exported.out.strip(), "target": str(tmp_path / "file")}
    assert cli("import", "-", "piped", stdin=(tmp_path / "file").read_bytes()).out == exported.out
    refused = cli("export", IMAGE, str(tmp_path))
    assert refused.status == 125 and "hint: " in refused.err
    assert cli("load", "--base", "named", "-i", str(tmp_path / "file")).out == "again:v1\n"


def test_inspect_takes_machines_and_images(cli: Cli) -> None:
    cli("create", "--name", IMAGE, IMAGE)
    machine, image = cli("inspect", IMAGE, f"{IMAGE}:latest").json
    assert machine["state"] == "created" and image["used_by"] == [f"machine:{machine['id']}"]
    assert cli("inspect", "--type", "image", IMAGE).json == [image] == cli("images", "inspect", image["digest"][7:19]).json
    assert cli("inspect", "--type", "machine", f"{IMAGE}:latest").status == 125
    neither = cli("inspect", "nothing")
    assert "no machine and no image nothing" in neither.err and "hint: " in neither.err


def test_remove_by_digest(cli: Cli) -> None:
    digest = cli("inspect", IMAGE).json[0]["digest"]
    cli("tag", IMAGE, "other")
    refused = cli("rmi", digest)
    assert refused.status == 125 and "other:latest" in refused.err
    assert cli("rmi", "other").status == 0
    assert cli("rmi", digest[7:19]).status == 0
    assert cli("images", "ls", "--json").json == []


def test_remove_by_force(cli: Cli) -> None:
    digest = cli("inspect", IMAGE).json[0]["digest"]
    cli("tag", IMAGE, "other")
    cli("create", "--name", "web", IMAGE)
    refused = cli("rmi", IMAGE, "other")
    assert refused.status == 125 and "used by machine:" in refused.err and "hint: " in refused.err
    cli("tag", digest, IMAGE)
    done = cli("rmi", "--force", "none", digest[7:19])
    assert done.status == 0 and "there is no image none" in done.err and done.out == digest[7:19] + "\n"
    assert cli("images", "ls", "--json").json == []
    assert cli("inspect", "web").json[0]["state"] == "created"


def test_prune_takes_cache_mounts(cli: Cli, home: TestHome) -> None:
    kept = home.root / "volumes" / f"build-{'0' * 24}/kept"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(50_000))
    assert cli("du", "--json").json["caches"]["reclaimable"] >= 50_000
    assert cli("prune").out == "freed 0B\n" and kept.exists()
    assert cli("prune", "--all", "--dry-run", "--json").json["freed"] >= 50_000 and kept.exists()
    cli("prune", "--all")
    assert not kept.parent.exists()


def test_history(cli: Cli) -> None:
    lines = cli("history", IMAGE).out.splitlines()
    assert lines[0].split() == ["CREATED", "SIZE", "BY"] and lines[1].endswith("import")
    assert cli("history", "--json", IMAGE).json[0]["by"] == "import"


def test_du_and_prune(cli: Cli) -> None:
    first = [line.split("  ")[0] for line in cli("du").out.splitlines()]
    assert first == ["WHAT", "images", "build cache", "cache mounts", "roots", "downloads", "other", "all"]
    assert f"{IMAGE}:latest" in cli("du", "-v").out
    cli("create", "--name", "web", IMAGE)
    cli("tag", IMAGE, "other")
    assert cli("prune").out == "freed 0B\n"
    assert cli("prune", "--all", "--json").json["images"] == [], "a machine has it"
    cli("delete", "web")
    assert cli("prune", "--all", "--older", "1h").out == "freed 0B\n"
    assert cli("prune", "--all", "--label", "a=b").out == "freed 0B\n"
    size = cli("du", "--json").json["size"]
    assert size > 0
    told = cli("prune", "--all", "--dry-run").out.splitlines()
    assert told[:2] == ["other:latest", f"{IMAGE}:latest"] and told[2].startswith("would free ")
    assert cli("du", "--json").json["size"] == size
    assert cli("prune", "--all").out.splitlines()[:2] == ["other:latest", f"{IMAGE}:latest"]
    assert cli("du", "--json").json["size"] == 0
    assert cli("prune", "--label", "a").status == 2
    assert cli("prune", "--older", "soon").status == 125


def test_check(cli: Cli, home: TestHome) -> None:
    assert cli("images", "check").status == 0
    blob = home.open().images.get(IMAGE).layers[0].digest
    path = home.root / "store/blobs/sha256" / blob[7:]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = cli("images", "check", "--json")
    assert done.status == 1 and blob in done.json[0]


@pytest.mark.parametrize("words", [["save"], ["export", "x"], ["pull"], ["push"], ["tag", "x"], ["rmi"], ["import", "x"]])
def test_too_few_words(cli: Cli, words: list[str]) -> None:
    assert cli(*words).status == 2


def test_reader_of_an_archive_that_goes_away(home: TestHome, tmp_path: Path) -> None:
    """No traceback, and no lease of the image that stays."""
    with process(home, "save", IMAGE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert "Traceback" not in running.stderr.read()
        assert running.wait(30) in (0, 141)
    assert not list((home.root / "store/tmp").glob("*-*"))


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each blob and one for all, gone at the end; then one line that says what it was."""
    leader, follower = os.openpty()
    with os.fdopen(follower, "w", buffering=1) as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with Bars("asking") as bars:
            for digest in "ab":
                bars(Progress(f"sha256:{digest * 64}", 0, 1000, "queued"))
            bars(Progress(f"sha256:{'a' * 64}", 400, 1000, "downloading"))
            bars(Progress(f"sha256:{'a' * 64}", 1000, 1000, "done"))
            bars(Progress(f"sha256:{'b' * 64}", 1000, 1000, "exists"))
        data = b""
        while b"\n" not in data.partition(b" blobs, ")[2]:  # a terminal gives 4 KiB at a time
            data += os.read(leader, 1 << 16)
        shown = data.decode()
    os.close(leader)
    for words in ("aaaaaaaaaaaa", "bbbbbbbbbbbb", "all", "downloaded", "already there", "2 blobs, 2K, in ", " s, 1 already there"):
        assert words in shown


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivisor.cli.bars.QUIET_FOR", -1)
    with pytest.raises(KeyboardInterrupt), Bars("asking") as bars:
        bars(Progress(f"sha256:{'a' * 64}", 0, 2048, "queued"))
        bars(Progress(f"sha256:{'a' * 64}", 1024, 2048, "uploading"))
        bars(Progress(f"sha256:{'a' * 64}", 2048, 2048, "done"))
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "trivisor: 0B of 2K\ntrivisor: 1K of 2K\ntrivisor: aaaaaaaaaaaa: uploaded, 2K\n"
