"""A machine's root, image and all that it wrote, as a disk image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor.core.errors import InvalidSpec
from trivisor.core.spec import Wall
from trivisor.core.units import GIB, MIB
from trivisor.images.disks import package, qemuimg

pytestmark = pytest.mark.slow


def said(disk: Path, *requests: str) -> str:
    return "".join(subprocess.run(["debugfs", "-R", one, disk], capture_output=True, text=True, check=True).stdout for one in requests)


def test_a_machines_root_becomes_a_disk(make: Make, wall: Wall, tmp_path: Path) -> None:
    """While it runs; what it removed is gone, owners and modes are what they were, and the file system is whole."""
    machine = make("mini", disk="1G")
    machine.exec(
        "echo mine > /root/mine; chmod 640 /root/mine; ln /root/mine /other; mkdir /gone; rm -r /gone; rm /etc/os-release", check=True
    )
    made = machine.export_disk(tmp_path / "root.qcow2")
    assert (made.format, made.size) == ("qcow2", GIB) and machine.state.value == "running"
    disk = tmp_path / "root.raw"
    qemuimg.convert(qemuimg.open_source(tmp_path / "root.qcow2", None), disk, "raw")
    assert disk.stat().st_blocks * 512 < 128 * MIB
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)
    assert said(disk, "cat /root/mine", "cat /other") == "mine\nmine\n"
    stat = said(disk, "stat /root/mine")
    assert "Mode:  0640" in stat and "User:     0" in stat and "Links: 2" in stat
    assert "gone" not in said(disk, "ls /") and "bin" in said(disk, "ls /") and "os-release" not in said(disk, "ls /etc")
    if wall == "container":
        assert machine.export_disk(tmp_path / "root.ova").format == "vmdk"
        with package.opened(tmp_path / "root.ova") as opened:
            assert (opened.system.name, opened.system.memory, opened.system.disks[0].capacity) == (machine.name, machine.spec.memory, GIB)
        with pytest.raises(InvalidSpec, match="too small"):
            machine.export_disk(tmp_path / "small.raw", size=16 * MIB)
        assert not (tmp_path / "small.raw").exists()
