"""The verb `disk`, as a user types it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cli_support import Cli
from machine_home import IMAGE

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "Data.img"
    path.write_bytes(os.urandom(70_000).ljust(1 << 20, b"\0"))
    return path


def test_disks_in_and_out(cli: Cli, raw: Path, tmp_path: Path) -> None:
    assert cli("disk").out.split() == ["NAME", "SIZE", "STORED", "FROM", "CREATED", "MACHINES"]
    assert cli("disk", "import", str(raw)).out == "data\n"
    assert cli("disk", "export", "data", str(tmp_path / "out.vmdk")).out == str(tmp_path / "out.vmdk") + "\n"
    again = cli("disk", "import", "--json", str(tmp_path / "out.vmdk"), "again").json
    assert (again["name"], again["format"], again["size"]) == ("again", "vmdk", 1 << 20)
    said = cli("disk", "export", "--json", "--format", "raw", "again", str(tmp_path / "out")).json
    assert said == {"file": str(tmp_path / "out"), "format": "raw", "size": 1 << 20}
    assert (tmp_path / "out").read_bytes() == raw.read_bytes()
    listed = cli("disk", "list").out.splitlines()
    assert [line.split()[:4:3] for line in listed[1:]] == [["again", "vmdk"], ["data", "raw"]]
    assert cli("disk", "inspect", "again", "data").json[1]["source"] == str(raw)
    assert cli("disk", "rm", "again", "data").out == "again\ndata\n"
    assert cli("disk", "--json").json == []


def test_what_goes_wrong_is_said(cli: Cli, raw: Path, tmp_path: Path) -> None:
    assert cli("disk", "import", str(tmp_path / "none")).status == 2
    assert cli("disk", "import", str(raw), "No Name").status == 125
    refused = cli("disk", "import", "--format", "vmdk", str(raw))
    assert refused.status == 125 and "is raw, not vmdk" in refused.err and "hint: " in refused.err
    assert cli("disk", "import", "-q", str(raw)).err == ""
    taken = cli("disk", "import", str(raw))
    assert taken.status == 125 and "already" in taken.err
    assert cli("disk", "export", "data", str(tmp_path / "out.zip")).status == 125
    assert cli("disk", "export", "none", str(tmp_path / "out.raw")).status == 125
    assert cli("disk", "rm", "none").status == 125
    assert cli("disk", "export", "--size", "1G", "data", str(tmp_path / "out.raw")).status == 2
    assert cli("disk", "export", "--machine", "none", str(tmp_path / "out.raw")).status == 125
    assert not (tmp_path / "out.zip").exists() and not (tmp_path / "out.raw").exists()


def test_packages_in_and_out(cli: Cli, raw: Path, tmp_path: Path) -> None:
    cli("disk", "import", str(raw))
    assert cli("disk", "export", "--cpus", "2", "--memory", "512M", "data", str(tmp_path / "a.ova")).status == 0
    done = cli("disk", "import", str(tmp_path / "a.ova"), "again")
    assert done.out == "again\n" and done.err == "trivisor: its machine has 2 processors, 512M of memory, 0 network cards\n"
    said = cli("disk", "import", "--json", str(tmp_path / "a.ova")).json
    assert (said["cpus"], said["memory"], said["cards"], [disk["name"] for disk in said["disks"]]) == (2, 512 << 20, [], ["a"])
    (tmp_path / "a.ova").write_bytes(b"no")
    assert cli("disk", "import", str(tmp_path / "a.ova"), "more").status == 125


def test_a_wall_without_disks_says_so(cli: Cli, raw: Path) -> None:
    cli("disk", "import", str(raw))
    cli("create", "--name", "web", IMAGE)
    refused = cli("device", "attach", "web", "disk", "disk:data")
    assert refused.status == 125 and "hint: " in refused.err
