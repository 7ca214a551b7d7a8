"""Folders that a running container is given, and gives back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivisor import VMM, Machine
from trivisor.core.errors import EngineError, InvalidSpec, UnsupportedByWall
from trivisor.vos.devices import SharedFolder, Watchdog

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount from outside")]


@pytest.fixture
def machine(wall_vmm: VMM) -> Iterator[Machine]:
    report = {report.wall: report for report in wall_vmm.walls()}["container"]
    if not report.available:
        pytest.skip(f"needs the container wall: {report.why}")
    yield wall_vmm.run("debian", wall="container")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("shared")
    return tmp_path


def test_it_comes_and_goes(machine: Machine, folder: Path) -> None:
    for _ in range(20):
        attached = machine.devices.attach(SharedFolder(folder, "/mnt/deep/shared"), "folder")
        assert (attached.kind, attached.plugged, attached.path) == ("folder", True, str(folder))
        assert machine.devices.node("folder") == "/mnt/deep/shared"
        machine.devices.detach("folder")
        assert machine.devices.list() == []
    assert machine.exec("ls /mnt/deep/shared").text == ""


def test_its_ids_are_the_machines(machine: Machine, folder: Path) -> None:
    machine.devices.attach(SharedFolder(folder, "/mnt/shared"), "folder")
    assert machine.exec("cat /mnt/shared/file; echo back >/mnt/shared/new; stat -c %u /mnt/shared/new", check=True).text == "shared0\n"
    assert ((folder / "new").read_text(), (folder / "new").stat().st_uid) == ("back\n", 0)
    machine.devices.attach(SharedFolder(folder, "/mnt/fixed", readonly=True), "fixed")
    assert b"Read-only" in machine.exec("touch /mnt/fixed/x").stderr
    os.mknod(folder / "null", 0o020666, os.makedev(1, 3))
    assert b"Permission denied" in machine.exec("cat /mnt/shared/null").stderr, "no device in it works"


def test_it_is_kept_for_each_start(wall_vmm: VMM, machine: Machine, folder: Path) -> None:
    machine.stop()
    assert not machine.devices.attach(SharedFolder(folder, "/mnt/shared"), "folder").plugged
    machine.start()
    assert machine.exec("cat /mnt/shared/file").text == "shared"
    machine.stop()
    machine.devices.detach("folder")
    machine.start()
    assert machine.exec("ls /mnt/shared").text == ""


def test_no_link_of_the_container_leads_elsewhere(machine: Machine, folder: Path) -> None:
    """The mount is made by the host's root: where a link led it would be the container's choice."""
    machine.exec("ln -s /srv /mnt/link; mkdir -p /new/there /srv/there", check=True)
    with pytest.raises(EngineError, match="cannot be mounted"):
        machine.devices.attach(SharedFolder(folder, "/mnt/link/there"), "folder")
    assert machine.devices.list() == []
    machine.devices.attach(SharedFolder(folder, "/new/there"), "folder")
    machine.exec("mv /new /old && ln -s /old /new", check=True)
    assert machine.exec("cat /old/there/file").text == "shared"
    with pytest.raises(EngineError, match="cannot be unmounted"):
        machine.devices.detach("folder")
    machine.exec("rm /new && mv /old /new", check=True)
    machine.devices.detach("folder")


def test_what_it_cannot_be_given(machine: Machine, folder: Path) -> None:
    with pytest.raises(UnsupportedByWall):
        machine.devices.attach(Watchdog())
    with pytest.raises(InvalidSpec, match="cannot be shared"):
        machine.devices.attach(SharedFolder("/proc", "/mnt/x"))
