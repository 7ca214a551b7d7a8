"""Programs that take all they can get: only their machine suffers, and it can be stopped, used again and deleted."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from host_sentinel import Sentinel
from machine_home import VmHome
from wall_fixtures import Make

from trivisor import VMM, GuestError, InvalidState, Machine, State
from trivisor.core.spec import Wall
from trivisor.launch import cgroup_layout

BOUND = 60.0
MIB = 1 << 20
ENOUGH = 2048 * MIB
"""More than machines of other tests take meanwhile, less than what has no bound takes."""
BOMB = "bomb() { bomb | bomb & }; bomb"
MEMORY = "a = []\nwhile True: a.append(b'x' * (1 << 20))"
DEAF = "trap '' TERM INT HUP QUIT; (trap '' TERM INT HUP QUIT; while :; do sleep 0.1; done) & while :; do sleep 0.1; done"
DESCRIPTORS = """\
import socket, time
held = []
try:
    while len(held) < 60000:
        held.append(socket.socketpair())
except OSError:
    time.sleep(1)
"""
REBORN = "reborn() { trap 'reborn & exit' TERM; while :; do sleep 0.05; done; }; reborn"


@pytest.fixture
def neighbour(make: Make) -> Machine:
    """Another machine behind the same wall."""
    return make(name="neighbour")


def needs(wall: Wall, controller: str) -> None:
    layout = cgroup_layout.layout()
    if wall != "vm" and layout.of(controller) is None:
        pytest.skip(f"needs the {controller} controller: {layout.lacks[controller]}")


def available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) << 10


def ends_well(machine: Machine) -> None:
    """Whatever state it is in: it comes to a stop in time, and is of use again."""
    begun = time.monotonic()
    if machine.state is State.RUNNING:
        with suppress(InvalidState):  # it died of what it did, this moment
            machine.stop(timeout=5)
    assert time.monotonic() - begun < BOUND
    assert machine.state in (State.STOPPED, State.FAILED)
    machine.start()
    assert machine.exec(["echo", "here"], timeout=BOUND).text == "here\n"


def test_a_fork_bomb(make: Make, wall: Wall, neighbour: Machine, sentinel: Sentinel) -> None:
    needs(wall, "pids")
    machine = make()
    before = len([name for name in os.listdir("/proc") if name.isdigit()])
    machine.spawn(BOMB, detach=True)
    most = 0
    for _ in range(20):
        most = max(most, len([name for name in os.listdir("/proc") if name.isdigit()]))
        subprocess.run(["true"], check=True, timeout=BOUND)
        time.sleep(0.1)  # while it grows
    assert most - before < 2048 + 500
    assert neighbour.exec(["echo", "here"], timeout=BOUND).text == "here\n"
    ends_well(machine)


@pytest.mark.timeout(300)
def test_a_memory_hog(make: Make, wall: Wall, neighbour: Machine, sentinel: Sentinel) -> None:
    needs(wall, "memory")
    machine = make(memory="128M")
    before = available()
    with suppress(GuestError, InvalidState):
        machine.exec(["python3", "-c", MEMORY], timeout=20)
    assert before - available() < ENOUGH
    assert neighbour.exec(["echo", "here"], timeout=BOUND).text == "here\n"
    ends_well(machine)


@pytest.mark.parametrize("deaf", [DEAF, REBORN], ids=["deaf", "reborn"])
def test_programs_that_do_not_stop(make: Make, sentinel: Sentinel, deaf: str) -> None:
    machine = make()
    for _ in range(3):
        machine.spawn(deaf, detach=True)
    machine.exec(["true"], timeout=BOUND)
    begun = time.monotonic()
    machine.stop()
    assert time.monotonic() - begun < 40
    ends_well(machine)


def test_many_open_files_and_connections(make: Make, neighbour: Machine, sentinel: Sentinel) -> None:
    machine = make()
    with suppress(GuestError):
        machine.exec(["python3", "-c", DESCRIPTORS], timeout=BOUND)
    with open("/dev/null") as null:
        assert null.fileno() > 0
    assert neighbour.exec(["echo", "here"], timeout=BOUND).text == "here\n"
    ends_well(machine)


@pytest.fixture
def small_home(tmp_path: Path, iced_home: Path) -> Iterator[VmHome]:
    """A home on a file system of its own, with little room."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1400 * MIB)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs mkfs.ext4 and loop devices")
    home = None
    try:
        home = VmHome(place / "home", iced_home)
        about = os.statvfs(place)
        with (place / "filler").open("wb") as filler:  # what a machine fills takes as long as there is room
            os.posix_fallocate(filler.fileno(), 0, about.f_bavail * about.f_frsize - 256 * MIB)
        yield home
    finally:
        if home is not None:
            home.clear()
        deadline = time.monotonic() + BOUND
        # What was killed lets go of its files some time later, which nobody tells us of.
        while subprocess.run(["umount", place], check=False, capture_output=True).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def room(home: VmHome) -> int:
    about = os.statvfs(home.root)
    return about.f_bavail * about.f_frsize


@pytest.mark.walls("gvisor", "container")
@pytest.mark.timeout(300)
def test_a_full_disk(small_home: VmHome, wall: Wall, sentinel: Sentinel) -> None:
    """What a machine writes may fill the file system of the home, and nothing else: it is told so, lives on and gives all back."""
    with VMM(small_home.root) as vmm:
        machine = vmm.create("debian", wall=wall)
        machine.start()
        free = room(small_home)  # with the image unpacked, which stays
        result = machine.exec("tr '\\0' x </dev/zero >/root/big", timeout=BOUND)
        assert not result.ok
        assert b"No space left" in result.stderr
        assert room(small_home) < 16 * MIB < free
        assert machine.exec(["echo", "here"], timeout=BOUND).text == "here\n"
        with pytest.raises(OSError, match="No space"):
            machine.files.write("/root/more", bytes(MIB))
        machine.exec(["rm", "/root/big"], check=True)
        machine.files.write("/root/more", bytes(MIB))
        machine.exec("tr '\\0' x </dev/zero >/root/big", timeout=BOUND)
        machine.delete(force=True)
        deadline = time.monotonic() + BOUND
        while room(small_home) <= free - 8 * MIB:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_disk_in_memory_is_bounded_by_it(make: Make, wall: Wall, neighbour: Machine) -> None:
    needs(wall, "memory")
    machine = make(disk="ram", memory="128M")
    before = available()
    with suppress(GuestError):
        assert not machine.exec("tr '\\0' x </dev/zero >/root/big", timeout=BOUND).ok
    assert before - available() < ENOUGH
    assert neighbour.exec(["echo", "here"], timeout=BOUND).text == "here\n"
    ends_well(machine)
