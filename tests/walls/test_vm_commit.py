"""Committing a virtual machine whose disk is not what it should be, and commits that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine_home import VmHome

from trivisor import VMM, Machine, State
from trivisor.core.errors import ImageError
from trivisor.core.spec import Wall

pytestmark = pytest.mark.walls("vm")
COMMIT = "import sys; from trivisor import VMM\nwith VMM(sys.argv[1]) as vmm: vmm.get(sys.argv[2]).commit('committed-killed')"


@pytest.fixture(scope="module")
def machine(wall_home: VmHome, wall: Wall) -> Iterator[Machine]:
    """A machine that wrote something."""
    with VMM(wall_home.root) as vmm:
        machine = vmm.create("mini", wall=wall, memory="128M", disk="64M")
        machine.start()
        machine.exec("mkdir -p /d/e; echo x >/d/e/x; rm /bin/yes; sync", check=True)
        yield machine
        machine.delete(force=True)


def workspaces(home: Path) -> list[Path]:
    return [*home.glob("tmp/*"), *home.glob("store/tmp/*")]


def test_a_commit_that_is_killed(wall_home: VmHome, machine: Machine) -> None:
    """While the helper reads the disk: nothing is left but what the next sweep takes, and the machine runs on."""
    home = wall_home.root
    before = workspaces(home)
    child = subprocess.Popen([sys.executable, "-c", COMMIT, str(home), machine.id])
    deadline = time.monotonic() + 60
    while not list(home.glob(f"tmp/{child.pid}-*-reading-*/machine/keeper")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.002)
    child.kill()
    child.wait()
    with VMM(home) as vmm:
        vmm.sweep()
        assert machine.state is State.RUNNING
        assert machine.exec(["cat", "/d/e/x"], check=True).text == "x\n"
        assert workspaces(home) == before
        assert "committed-killed:latest" not in [image.name for image in vmm.images.list()]


def zero(disk: Path, start: int, size: int) -> None:
    with disk.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))


def noise(disk: Path) -> None:
    """Over all that mkfs and the guest wrote but for the superblock."""
    with disk.open("r+b") as file:
        while (at := os.lseek(file.fileno(), file.tell(), os.SEEK_DATA)) < 60 << 20:
            file.seek(max(at, 4096))
            file.write(os.urandom(4096))
            if file.tell() > 8 << 20:
                break


def debugfs(*commands: str) -> Callable[[Path], None]:
    """Change it as a guest may that writes to its disk past its file system."""

    def change(disk: Path) -> None:
        path = {**os.environ, "PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
        for command in commands:
            subprocess.run(["debugfs", "-w", "-R", command, disk], check=True, capture_output=True, env=path)

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no file system": lambda disk: zero(disk, 0, 1 << 20),
    "noise": noise,
    "a folder in itself": debugfs("ln upper upper/d/e/again"),
    "no folder": debugfs("unlink upper", "write /etc/hostname upper"),
    "panics": debugfs("set_super_value errors 3", "clri upper/d/e"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_disk_that_is_damaged(wall_home: VmHome, machine: Machine, damage: str, tmp_path: Path) -> None:
    """By its guest, which is hostile: the helper alone meets it, and an error says so."""
    if machine.state is State.RUNNING:
        machine.stop()
    disk, kept = wall_home.folder(machine) / "disk.qcow2", tmp_path / "kept"
    raw = tmp_path / "raw"
    disk.rename(kept)
    try:
        subprocess.run(["qemu-img", "convert", "-O", "raw", kept, raw], check=True)
        DAMAGES[damage](raw)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
        before = workspaces(wall_home.root)
        with pytest.raises(ImageError, match="disk cannot be read"):
            machine.commit("committed")
        assert workspaces(wall_home.root) == before
        assert machine.state is State.STOPPED
    finally:
        kept.rename(disk)


def test_it_can_be_committed_after_all(wall_home: VmHome, machine: Machine) -> None:
    with VMM(wall_home.root) as vmm:
        layer = machine.commit("committed").layers[-1]
        assert layer.size > 0
        vmm.images.remove("committed")
