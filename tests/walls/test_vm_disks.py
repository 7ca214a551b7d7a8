"""Disks from other hypervisors, in virtual machines."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, Machine
from trivisor.core.devices import Disk
from trivisor.core.errors import CallerError, InvalidSpec, NotFound
from trivisor.core.spec import Wall
from trivisor.core.units import MIB
from trivisor.images.disks import qemuimg
from trivisor.images.disks.formats import Format

pytestmark = [pytest.mark.slow, pytest.mark.walls("vm")]


@pytest.fixture(scope="module")
def vmm(wall_home: VmHome) -> Iterator[VMM]:
    with VMM(wall_home.root) as opened:
        yield opened
        for disk in opened.disks.list():
            opened.disks.remove(disk.name)


def ext4(folder: Path, kind: Format) -> Path:
    """Make a disk of another hypervisor with a file system on it."""
    tree, raw, disk = folder / "tree", folder / "raw", folder / f"disk.{kind}"
    tree.mkdir()
    (tree / "hello").write_text(f"from a {kind}\n")
    with raw.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, raw], check=True)
    qemuimg.convert(qemuimg.open_source(raw, "raw"), disk, kind)
    return disk


@pytest.fixture(scope="module", params=["vmdk", "vhdx"])
def disk(request: pytest.FixtureRequest, vmm: VMM, tmp_path_factory: pytest.TempPathFactory) -> str:
    kind: Format = request.param
    return vmm.disks.import_(ext4(tmp_path_factory.mktemp("disk"), kind), f"data-{kind}").name


def node(machine: Machine, name: str) -> str:
    found = machine.devices.node(name)
    assert found is not None
    return found


def test_a_disk_of_another_hypervisor_is_a_machines_disk(wall: Wall, vmm: VMM, running: Machine, disk: str, tmp_path: Path) -> None:
    """It is mounted and written to; the disk itself stays as it was, and what the machine wrote goes with its device."""
    attached = running.devices.attach(Disk(f"disk:{disk}"), "data")
    running.exec(f"mount {node(running, 'data')} /mnt && cat /mnt/hello && echo more > /mnt/more && umount /mnt", check=True)
    assert attached.plugged and vmm.disks.get(disk).machines == (running.name,)
    with pytest.raises(CallerError, match=running.name):
        vmm.disks.remove(disk)
    assert running.export_disk(tmp_path / "now.raw", device="data").size == 16 * MIB
    found = subprocess.run(["debugfs", "-R", "cat /more", tmp_path / "now.raw"], capture_output=True, text=True, check=True)
    assert found.stdout == "more\n" and running.state.value == "running"
    with pytest.raises(NotFound, match="no disk other"):
        running.export_disk(tmp_path / "other.raw", device="other")
    running.devices.detach("data")
    assert vmm.disks.get(disk).machines == () and not list((vmm.home / "machines" / running.id / "disks").iterdir())
    running.devices.attach(Disk(f"disk:{disk}", readonly=True), "data")
    with pytest.raises(InvalidSpec, match="attached as data already"):
        running.devices.attach(Disk(f"disk:{disk}", readonly=True), "again")
    running.devices.attach(Disk(f"disk:{disk}"), "other")
    for name in ("data", "other"):
        said = running.exec(f"mount -o ro {node(running, name)} /mnt && ls /mnt && umount /mnt", check=True)
        assert "hello" in said.text and "more" not in said.text
    running.devices.detach("data")
    assert vmm.disks.get(disk).machines == (running.name,)
    running.devices.detach("other")
    assert vmm.disks.get(disk).machines == ()
    with pytest.raises(NotFound):
        running.devices.attach(Disk("disk:none"))


@pytest.mark.parametrize("disk", ["vmdk"], indirect=True)
def test_what_it_wrote_stays_until_it_is_deleted(wall: Wall, vmm: VMM, make: Make, disk: str) -> None:
    machine = make()
    machine.devices.attach(Disk(f"disk:{disk}"), "data")
    machine.exec(f"mount {node(machine, 'data')} /mnt && echo mine > /mnt/mine && umount /mnt", check=True)
    machine.stop()
    machine.start()
    assert machine.exec(f"mount {node(machine, 'data')} /mnt && cat /mnt/hello /mnt/mine", check=True).text.endswith("\nmine\n")
    machine.delete(force=True)
    assert vmm.disks.get(disk).machines == ()
