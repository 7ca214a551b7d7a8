"""Folders that a running machine is given, and gives back: behind each wall that can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, Machine
from trivisor.core.errors import EngineError, HostLacks, InvalidSpec, UnsupportedByWall
from trivisor.core.spec import Wall
from trivisor.vos.devices import SharedFolder, Watchdog

pytestmark = [pytest.mark.slow, pytest.mark.walls("vm", "container"), pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture(scope="module")
def open_machine(wall_home: VmHome, wall: Wall, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One running machine that folders can be given to."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.run("debian", wall=wall, ram="shared" if wall == "vm" else "private")
        try:
            machine.devices.attach(SharedFolder(tmp_path_factory.mktemp("probe"), "/mnt/probe"), "probe")
        except HostLacks as error:
            machine.delete(force=True)
            pytest.skip(f"needs what serves folders: {error}")
        machine.devices.detach("probe")
        yield machine
        machine.delete(force=True)


@pytest.fixture
def machine(open_machine: Machine) -> Iterator[Machine]:
    yield open_machine
    if open_machine.state != "running":
        open_machine.start()
    for device in open_machine.devices.list():
        open_machine.devices.detach(device.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("shared")
    return tmp_path


def test_it_comes_and_goes(machine: Machine, wall: Wall, folder: Path) -> None:
    for _ in range(20 if wall == "container" else 3):
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


def test_it_is_kept_for_each_start(machine: Machine, folder: Path) -> None:
    machine.stop()
    assert not machine.devices.attach(SharedFolder(folder, "/mnt/shared"), "folder").plugged
    machine.start()
    assert machine.exec("cat /mnt/shared/file").text == "shared"
    machine.stop()
    machine.devices.detach("folder")
    machine.start()
    assert machine.exec("ls /mnt/shared").text == ""


def test_one_whose_attach_was_cut_short(machine: Machine, wall_home: VmHome, folder: Path) -> None:
    """Written down, and not plugged: a detach forgets it, a start plugs it."""
    written = wall_home.root / "machines" / machine.id / "devices.json"
    machine.devices.attach(SharedFolder(folder, "/mnt/shared"), "folder")
    known = written.read_bytes()
    machine.devices.detach("folder")
    written.write_bytes(known)
    assert [device.plugged for device in machine.devices.list()] == [False]
    machine.devices.detach("folder")
    assert machine.devices.list() == []


@pytest.mark.walls("container")
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


@pytest.mark.walls("container", "gvisor")
def test_other_devices_are_of_virtual_machines(running: Machine, folder: Path, wall: Wall) -> None:
    with pytest.raises(UnsupportedByWall):
        running.devices.attach(Watchdog())
    if wall == "gvisor":
        with pytest.raises(UnsupportedByWall):
            running.devices.attach(SharedFolder(folder, "/mnt/x"))


def test_what_cannot_be_shared(machine: Machine, folder: Path) -> None:
    machine.devices.attach(SharedFolder(folder, "/mnt/x"), "there")
    with pytest.raises(InvalidSpec, match="already"):
        machine.devices.attach(SharedFolder(folder, "/mnt/x"))
    with pytest.raises(InvalidSpec, match="cannot be shared"):
        machine.devices.attach(SharedFolder("/proc", "/mnt/y"))
