"""A disk's size that was asked for is enforced behind every wall, and is an error where it cannot be."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from wall_fixtures import Make

from trivisor import VMM, HostLacks, Machine, State, StorageError
from trivisor.core.spec import Wall
from trivisor.launch import keeper, loop
from trivisor.vmm import layers

BOUND = 120.0
MIB = 1 << 20
FILL = "tr '\\0' x </dev/zero >/root/big"


def loops(folder: Path) -> list[str]:
    """The loop devices whose file is of this machine."""
    found = []
    for place in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if place.read_text().startswith(f"{folder}/"):
                found.append(place.parts[3])
        except OSError:
            continue  # it went away meanwhile
    return found


@pytest.fixture
def sized(wall: Wall) -> None:
    """Skip where the wall cannot enforce it here."""
    able, why = (True, "") if wall == "vm" else layers.disk_sizes()
    if not able:
        pytest.skip(why)


@pytest.mark.timeout(300)
def test_a_full_disk_is_full_at_its_size(make: Make, sized: None) -> None:
    """The one who fills it is told; the machine lives, and what is deleted can be written again."""
    machine = make(disk="64M")
    assert 40 * MIB < int(machine.exec("df -B1 --output=avail / | tail -1", check=True).text) <= 64 * MIB
    for _ in range(2):
        result = machine.exec(FILL, timeout=BOUND)
        assert not result.ok
        assert b"No space left" in result.stderr
        assert 40 * MIB < machine.files.stat("/root/big").size <= 64 * MIB
        with pytest.raises(OSError, match="No space"):
            machine.files.write("/root/more", bytes(MIB))
        assert machine.exec(["echo", "here"], timeout=BOUND).text == "here\n"
        machine.exec(["rm", "/root/big"], check=True)
    machine.files.write("/root/more", bytes(MIB))


@pytest.mark.walls("gvisor", "container")
def test_what_is_on_it_stays_through_stop_and_crash(make: Make, sized: None) -> None:
    machine = make(disk="64M")
    folder = Path(machine.info()["folder"])
    assert len(loops(folder)) == 1
    machine.exec("echo kept >/root/kept; rm /etc/hostname; chown 1:2 /root/kept; sync", check=True)
    machine.stop()
    machine.start()
    assert machine.files.read("/root/kept") == b"kept\n"
    keeper.kill(machine._context.home.machine(machine.id))
    assert machine.state is State.FAILED
    machine.start()
    about = machine.files.stat("/root/kept")
    assert (about.uid, about.gid) == (1, 2)
    machine.delete(force=True)
    deadline = time.monotonic() + BOUND
    while loops(folder):  # the kernel lets go of a disk after the last of its namespace, and tells nobody
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.walls("gvisor", "container")
def test_of_one_process(wall_vmm: VMM, wall: Wall, sized: None) -> None:
    """Such a machine's files need not survive the host, but it can be started again."""
    machine = wall_vmm.create("debian", wall=wall, disk="32M", lifetime="process")
    for _ in range(2):
        machine.start()
        assert not machine.exec(FILL, timeout=BOUND).ok
        machine.exec(["rm", "/root/big"], check=True)
        machine.stop()


@pytest.mark.walls("gvisor", "container")
def test_all_layers_of_the_hosts_root_share_it(make: Make, sized: None, tmp_path: Path) -> None:
    machine = make("host", disk="32M")
    assert not machine.exec("tr '\\0' x </dev/zero >/usr/big", timeout=BOUND).ok
    assert not machine.exec("tr '\\0' x </dev/zero >/etc/big", timeout=BOUND).ok
    both = machine.files.stat("/usr/big").size + machine.files.stat("/etc/big").size
    assert both <= 32 * MIB
    assert not Path("/usr/big").exists()


@pytest.mark.walls("container")
def test_what_was_deleted_is_given_back_to_the_host(make: Make, sized: None) -> None:
    """Behind gVisor too, but there a deleted file may stay open until the end, whose discards the kernel does not wait for."""
    machine = make(disk="64M")
    file = machine._context.home.machine(machine.id).root / "layers.ext4"
    machine.exec(FILL, timeout=BOUND)
    machine.exec("sync; rm /root/big; sync", check=True, timeout=BOUND)
    deadline = time.monotonic() + BOUND
    while file.stat().st_blocks * 512 > 32 * MIB and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel tells nobody when it has discarded
    assert file.stat().st_blocks * 512 < 32 * MIB


@pytest.mark.walls("gvisor", "container")
def test_where_it_cannot_be_enforced(wall_vmm: VMM, wall: Wall, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked for: refused before anything is made. Left to its default: the file system of the home is the bound, and doctor says so."""
    monkeypatch.setattr(loop, "_CONTROL", tmp_path / "loop-control")
    with pytest.raises(HostLacks, match="size of its disk cannot be enforced on this host") as caught:
        wall_vmm.create("debian", wall=wall, disk="64M")
    if os.geteuid() == 0:
        assert "loop-control" in str(caught.value)
        assert "modprobe loop" in caught.value.hint
    report = next(report for report in wall_vmm.walls() if report.wall == wall)
    assert not report.features["disk_size"]
    assert "cannot be enforced" in report.details["disk"]
    for wishes in ({}, {"disk": "ram"}):
        machine: Machine = wall_vmm.create("debian", wall=wall, **wishes)
        machine.start()
        assert machine.exec(["true"]).ok


@pytest.mark.walls("gvisor", "container")
def test_its_file_is_gone(wall_vmm: VMM, wall: Wall, sized: None) -> None:
    machine = wall_vmm.create("debian", wall=wall, disk="32M")
    folder = machine._context.home.machine(machine.id).root
    shutil.move(folder / "layers.ext4", folder / "elsewhere")
    with pytest.raises(StorageError, match="writable layer"):
        machine.start()
    assert machine.state is State.CREATED
